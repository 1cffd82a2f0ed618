"""transformers: once this module is imported, anybit checkpoints load with `from_pretrained`.

A checkpoint's tensors have the names of module parameters, so nothing is converted on the way in. This module is
imported while transformers itself is still being imported (`on_import.py`), so what needs its models is imported inside
the hooks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from anybit.checkpoint.layout import METHOD, VERSION
from anybit.errors import FormatError
from anybit.formats.kv import KVSpec
from anybit.layers.linear import Terms
from anybit.layers.swap import float_layers, swap_layers


class AnybitConfig(QuantizationConfigMixin):
    """The `quantization_config` of config.json: forms by layer name (docs/FORMAT.md)."""

    def __init__(
        self,
        version: int = VERSION,
        recipe: str = "",
        layers: dict[str, Any] | None = None,
        kv: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method: Any = METHOD
        self.version, self.recipe, self.layers = version, recipe, layers or {}
        if kv is not None:
            self.kv = kv


class AnybitQuantizer(HfQuantizer):
    """Puts our empty layers into the model before its weights are read, and checks them afterwards."""

    requires_calibration = True
    quantization_config: AnybitConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a checkpoint of a later format."""
        if self.quantization_config.version > VERSION:
            raise FormatError(
                f"format version {self.quantization_config.version}, this anybit reads {VERSION}; update anybit"
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from anybit.models.normalize import is_normal, normalize
        from anybit.models.structure import find_structure

        self.rewritten = not is_normal(model)
        normalize(model)
        structure = find_structure(model)
        with torch.device("meta"):
            tied = (structure.embedding, structure.head) if structure.tied else None
            swap_layers(model, self.quantization_config.layers, tied)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # transformers marks what it read, and gives random numbers and a warning to a parameter that is in no shard.
        missing = [name for name, p in model.named_parameters() if not getattr(p, "_is_hf_initialized", False)]
        if missing:
            raise FormatError(
                f"the checkpoint lacks {missing[0]} ({len(missing)} missing in all); restore its files or quantize again"
            )
        for name, module in model.named_modules():
            if isinstance(module, Terms):
                module.terms()
            elif isinstance(module, nn.Linear) and not module.weight.is_floating_point():
                raise FormatError(f"config.json says nothing of '{name}', whose weight is planes; restore its files")
        if saved := getattr(self.quantization_config, "kv", None):
            from anybit.layers.kv_cache import cache_as

            cache_as(model, KVSpec.read(saved))
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        """`model.dequantize()`: a float model with the values the codes stand for, at the precision in use."""
        if self.rewritten:
            raise FormatError(
                f"{type(model).__name__} was rewritten to be quantized; it has no float form in transformers"
            )
        if hasattr(model, "kv_spec"):
            raise FormatError(
                "this model caches keys and values as codes, which no float model does; keep it quantized"
            )
        float_layers(model, dtype)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Planes are what is saved and what is loaded, so saving is always possible."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient; adapters on top may train."""
        return False


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(METHOD)(AnybitConfig)
    register_quantizer(METHOD)(AnybitQuantizer)
