"""The quantization config that vLLM makes of our config.json, and which layers it gives a method of ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from anybit.checkpoint.layout import METHOD, VERSION
from anybit.errors import FormatError, InputError
from anybit.formats.form import Form
from anybit.formats.kv import KVSpec
from anybit.integrations.vllm.linear import AnybitLinear
from anybit.integrations.vllm.policy import Policy, Widths
from anybit.integrations.vllm.table import AnybitTable, TiedHead
from anybit.layers.precision import available_precisions

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in")
"""Last names of input embeddings, for the models of vLLM that build theirs without saying its name."""


class AnybitConfig(QuantizationConfig):
    """Forms by layer name (docs/FORMAT.md) and the precision policy.

    Attributes:
        policy, widths: set when the model is built.
        followed: whether `Steps` tells us what is in a batch (vLLM's second model runner and speculative decoding do not).
    """

    def __init__(self, forms: dict[str, Form], kv: KVSpec | None) -> None:
        super().__init__()
        self.forms, self.kv = forms, kv
        self.policy: Policy | None = None
        self.widths: Widths | None = None
        self.followed = False

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AnybitConfig:
        """From the `quantization_config` of config.json. Raises FormatError for a later format."""
        if config.get("version", 0) > VERSION:
            raise FormatError(f"format version {config['version']}, this anybit reads {VERSION}; update anybit")
        return cls(dict(config["layers"]), KVSpec.read(config["kv"]) if config.get("kv") else None)

    def get_name(self) -> str:
        """As in config.json."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Kernels compute in float32 whatever comes in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """bfloat16 matrix units."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """config.json says it all."""
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take on the names that a model has inside vLLM."""
        self.forms = hf_to_vllm_mapper.apply_dict(self.forms)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Our method for a layer whose parts have forms; None, or vLLM's own, for one kept in float.

        Raises:
            InputError: options that contradict each other. FormatError: a layer that cannot be served as it is written.
        """
        if self.widths is None:
            self._decide(get_current_vllm_config())
        assert self.widths is not None
        if isinstance(layer, ParallelLMHead):
            return self._head(prefix)
        if isinstance(layer, VocabParallelEmbedding):
            name = prefix if prefix in self.forms else self._embedding()
            return AnybitTable(name, self.forms[name], self.widths) if name in self.forms else None
        if isinstance(layer, LinearBase):
            parts = self._parts(prefix)
            return AnybitLinear(parts, self.widths) if parts else UnquantizedLinearMethod()
        inside = next((name for name in self.forms if name.startswith(f"{prefix}.")), "")
        if inside and type(layer).__name__ in ("RoutedExperts", "FusedMoE"):
            raise FormatError(f"'{inside}' is one of fused experts, which this plugin does not run; use `anybit serve`")
        return None

    def _decide(self, vllm: VllmConfig) -> None:
        """Fix the policy, and refuse what it and vLLM's settings cannot both mean."""
        available = available_precisions(self.forms.values())
        more = vllm.additional_config  # an object of their own for some platforms
        self.policy = Policy.read(more.get("anybit", {}) if isinstance(more, dict) else {}, available)
        if len(self.policy.asked) > 1 and vllm.cache_config.enable_prefix_caching:
            raise InputError(
                "precision changes while a text is written, and prefix caching would give its keys and values to prompts that "
                "ask for another one; add --no-enable-prefix-caching"
            )
        if len(self.policy.asked) > 1 and not self.followed:
            raise InputError(
                "precision by phase needs vLLM's logits processor plugins, which this model runner does not have (speculative "
                "decoding switches them off); give prefill and decode the same bits"
            )
        kept = self.kv is None or (self.kv.key_bits, self.kv.value_bits) == (16, 16)
        if not kept and self.policy.kv != "vllm":
            raise InputError(
                f"the checkpoint caches keys and values as {self.kv.word if self.kv else ''}, which vLLM cannot; add "
                """--additional-config '{"anybit": {"kv": "vllm"}}' to take vLLM's cache (--kv-cache-dtype) instead"""
            )
        self.widths = Widths(self.policy, available)

    def _embedding(self) -> str:
        """The checkpoint's name of the input embedding."""
        return next((name for name in self.forms if name.rpartition(".")[2] in EMBEDDINGS), "")

    def _head(self, prefix: str) -> QuantizeMethodBase | None:
        assert self.widths is not None
        if prefix in self.forms:
            return AnybitTable(prefix, self.forms[prefix], self.widths)
        tied = get_current_vllm_config().model_config.hf_text_config.tie_word_embeddings
        return TiedHead() if tied and self._embedding() else None

    def _parts(self, prefix: str) -> dict[str, Form]:
        """The forms behind a linear layer of vLLM by name, in the order of its rows; empty for one kept in float.

        Raises:
            FormatError: some of its parts are in float and some are not.
        """
        stem, _, last = prefix.rpartition(".")
        names = [f"{stem}.{part}" for part in self.packed_modules_mapping.get(last, [last])]
        found = [name for name in names if name in self.forms]
        if found and len(found) < len(names):
            float_part = next(name for name in names if name not in self.forms)
            raise FormatError(
                f"vLLM keeps {', '.join(names)} in one layer, and '{float_part}' is in float while '{found[0]}' is not; quantize "
                "all of them or none"
            )
        return {name: self.forms[name] for name in found}
