"""transformers: once this module is imported, anybit checkpoints load with `from_pretrained`, and float models quantize as they
load (`quantization_config=AnybitConfig(recipe="rtn-w4")`).

A checkpoint's tensors have the names of module parameters, so nothing is converted on the way in. This module is
imported while transformers itself is still being imported (`on_import.py`), so what needs its models is imported inside
the hooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from anybit.checkpoint.ledger import Ledger
from anybit.errors import FormatError, RecipeError, StructureError
from anybit.formats.kv import KVSpec
from anybit.layers.linear import Terms
from anybit.layers.swap import float_layers, swap_layers

if TYPE_CHECKING:
    from anybit.integrations.on_load import OnLoad


class AnybitConfig(QuantizationConfigMixin):
    """The `quantization_config` of config.json: forms by layer name (docs/FORMAT.md). For a float model: a recipe that needs no
    calibration, and `overrides` of it such as "weights.bits=3"; the forms are filled in as it loads."""

    def __init__(
        self,
        version: int = VERSION,
        recipe: str = "",
        layers: dict[str, Any] | None = None,
        kv: dict[str, Any] | None = None,
        overrides: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        self.quant_method: Any = METHOD
        self.version, self.recipe, self.layers = version, recipe, layers or {}
        if kv is not None:
            self.kv = kv
        if overrides:
            self.overrides = list(overrides)


class AnybitQuantizer(HfQuantizer):
    """Puts our empty layers into the model before its weights are read, and checks them afterwards."""

    quantization_config: AnybitConfig
    on_load: OnLoad | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a checkpoint of a later format."""
        if self.quantization_config.version > VERSION:
            raise FormatError(
                f"format version {self.quantization_config.version}, this anybit reads {VERSION}; update anybit"
            )
        if not self.pre_quantized and not self.quantization_config.recipe:
            raise RecipeError('AnybitConfig names no recipe to quantize this float model by; write recipe="rtn-w4"')

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from anybit.models.normalize import is_normal, normalize
        from anybit.models.structure import find_structure

        self.source = Path(kwargs["checkpoint_files"][0]).parent if kwargs.get("checkpoint_files") else None
        self.rewritten = not is_normal(model)
        normalize(model)
        structure, config = find_structure(model), self.quantization_config
        if not self.pre_quantized:
            from anybit.integrations.on_load import OnLoad

            if self.rewritten:
                raise StructureError(f"{type(model).__name__} cannot be quantized as it loads: use `anybit quantize`")
            self.on_load = OnLoad.plan(model, structure, config.recipe, getattr(config, "overrides", ()))
            config.layers, kv = self.on_load.forms, self.on_load.assignment.kv
            if kv is not None:
                config.kv = kv.as_dict()
        with torch.device("meta"):
            tied = (structure.embedding, structure.head) if structure.tied else None
            swap_layers(model, config.layers, tied)
            if self.on_load is not None:
                self.on_load.expect_float(model)
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether this is the float weight of a layer that is quantized as it loads."""
        return self.on_load is not None and param_name.removesuffix(".weight") in self.on_load.forms

    def get_quantize_ops(self) -> Any:
        """What turns such a weight into planes, scales and so on."""
        assert self.on_load is not None
        return self.on_load.operation()

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

    def ledger(self, model: Any) -> Ledger:
        """The account that came with the checkpoint, or of what was quantized as it loaded; see `anybit.save`.

        Raises:
            FormatError: the checkpoint has none.
        """
        if self.on_load is not None:
            return self.on_load.ledger(str(model.config.name_or_path))
        if self.source is None:
            raise FormatError("no file is known that this model was loaded from; load it with from_pretrained")
        return Ledger.read(self.source)

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
        """Codes have no gradient; adapters on top of them may train (`peft.py`)."""
        return True


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(METHOD)(AnybitConfig)
    register_quantizer(METHOD)(AnybitQuantizer)
