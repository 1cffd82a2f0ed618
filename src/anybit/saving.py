"""Write a model that transformers holds as a complete anybit directory: what `save_pretrained` writes, ledger and canary."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from anybit.checkpoint.canary import CANARY, echoes, write_canary
from anybit.checkpoint.layout import INDEX
from anybit.checkpoint.ledger import Ledger, tensor_sha256
from anybit.checkpoint.partial import beside, write_json
from anybit.errors import FormatError, InputError
from anybit.layers.linear import Terms

CANARY_IDS = range(16)
ECHOES = 8


def save(model: PreTrainedModel, directory: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Ledger:
    """Save a quantized model, from a checkpoint or quantized as it loaded, so that `anybit.load` and every command take it.

    The rows of the ledger are those of the quantization, after their hashes were found again; what stayed float, sizes and canary
    are taken anew from the files.

    Raises:
        InputError: `directory` holds something, or the model is not ours. FormatError: a quantized tensor is no longer what its
            row says, or there are no rows.
    """
    out = Path(directory)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty; choose another directory")
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if not hasattr(quantizer, "ledger"):
        raise InputError(f"this {type(model).__name__} is not quantized by anybit; use its save_pretrained")
    unfinished = beside(out, ".saving")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        model.save_pretrained(unfinished)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        ledger = _recounted(quantizer.ledger(model), _index(unfinished))
        ledger.write(unfinished)
        _write_canary(unfinished)
        if out.exists():
            out.rmdir()
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return ledger


def _index(directory: Path) -> dict[str, Tensor]:
    """Every tensor of the weights' files; writes the index that transformers leaves out where one file holds all."""
    tensors, files = dict[str, Tensor](), dict[str, str]()
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            found = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 (not a dict)
        tensors |= found
        files |= dict.fromkeys(found, file.name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))})
    return tensors


def _recounted(ledger: Ledger, tensors: Mapping[str, Tensor]) -> Ledger:
    rest = dict(tensors)
    for row in ledger.tensors:
        for key, expected in row.sha256.items():
            found = rest.pop(f"{row.name}.{key}", None)
            if found is None or tensor_sha256(found) != expected:
                raise FormatError(
                    f"{row.name}.{key} was changed since it was quantized: its ledger row is no longer true"
                )
    size = sum(tensor.nbytes for tensor in tensors.values())
    kept = {name: tensor_sha256(tensor) for name, tensor in rest.items()}
    warnings = list(ledger.warnings)
    if ledger.float_tensors and kept != ledger.float_tensors:
        warnings.append("float tensors were changed, or saved in another dtype, since the model was quantized")
    bits = ledger.bits_per_weight * size / max(ledger.size_bytes, 1)
    update = {"size_bytes": size, "bits_per_weight": bits, "float_tensors": kept, "warnings": warnings}
    return ledger.model_copy(update=update)


@torch.inference_mode()
def _write_canary(directory: Path) -> None:
    """Ask the model as it will be loaded."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    ids = torch.tensor([list(CANARY_IDS)]) % model.config.get_text_config().vocab_size
    hidden = cast(Tensor, model.get_input_embeddings()(ids))
    rounds = any(isinstance(m, Terms) and m.form.get("activations") for m in model.modules())
    asked = [hidden, *echoes(hidden, ECHOES if rounds else 0)]
    answer, *echoed = [model(inputs_embeds=states, use_cache=False).logits[0, -1] for states in asked]
    write_canary(directory / CANARY, ids[0], answer, echoed)
