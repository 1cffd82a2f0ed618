"""Which models GGUF and we both know, and what llama.cpp calls their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gguf
import torch
from torch import Tensor

from anybit.errors import InputError

# transformers model_type -> GGUF architecture; only these keep every tensor as it is but for the order of rotary rows.
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}


class Names:
    """Names and row orders of one model."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises InputError for an architecture that is not in `ARCHITECTURES`."""
        kind = str(config.get("model_type"))
        if kind not in ARCHITECTURES:
            raise InputError(f"GGUF of a {kind} model is not known here; {', '.join(ARCHITECTURES)} are")
        self.architecture = ARCHITECTURES[kind]
        self._map = gguf.get_tensor_name_map(self.architecture, int(config["num_hidden_layers"]))
        heads = int(config["num_attention_heads"])
        self._heads = {"q_proj": heads, "k_proj": int(config.get("num_key_value_heads") or heads)}

    def gguf_name(self, name: str) -> str:
        """Of a parameter such as `model.layers.0.mlp.up_proj.weight`. Raises InputError for one that llama.cpp does not have."""
        found = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise InputError(f"GGUF has no name for the tensor {name}")
        return str(found)

    def order(self, name: str, rows: int) -> Tensor | None:
        """Row i of the file is row order[i] of transformers' tensor; None where they agree. llama.cpp keeps the two halves of
        a rotary pair side by side in Llama's queries and keys."""
        heads = self._heads.get(name.split(".")[-2]) if name.count(".") > 1 else None
        if self.architecture != gguf.MODEL_ARCH.LLAMA or heads is None:
            return None
        if rows % (2 * heads):
            raise InputError(f"{name}: {rows} rows are no rotary pairs for {heads} heads; the metadata are wrong")
        return torch.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)
