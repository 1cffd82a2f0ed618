"""peft: LoRA on quantized layers; codes stay as they are, the adapters beside them train.

    config = with_anybit(LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(directory), config)
    ...
    model.save_pretrained(adapter)
    PeftModel.from_pretrained(base, adapter, config=with_anybit(PeftConfig.from_pretrained(adapter)))

peft asks the config which layer classes it does not know; the answer is not saved with an adapter, hence `with_anybit` again.
An adapter cannot be merged into codes: `model.dequantize()` gives a float model that takes it.
"""

from __future__ import annotations

import warnings
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from anybit.errors import InputError
from anybit.layers.linear import QuantLinear


def with_anybit(config: LoraConfig) -> LoraConfig:
    """The same config, which now knows our linear layers."""
    config._register_custom_module({QuantLinear: LoraQuantLinear})
    return config


class LoraQuantLinear(nn.Module, LoraLayer):
    """y = quantized layer(x) + sum over active adapters(scaling * B A dropout(x)); x [..., K] -> [..., N] in the dtype of x."""

    def __init__(self, base_layer: QuantLinear, adapter_name: str, **options: Any) -> None:
        """`options` are peft's own: config, r, lora_alpha, ...

        Raises:
            InputError: a layer whose input is quantized, since rounding has no gradient; a variant of LoRA that needs the weight.
        """
        super().__init__()
        config = options["config"]
        if base_layer.form.get("activations"):
            raise InputError(
                "a layer that quantizes its input passes no gradient on; train on a weight-only checkpoint"
            )
        if config.use_dora or config.init_lora_weights not in (True, False, "gaussian"):
            raise InputError(
                "DoRA, PiSSA and the like change or measure the float weight, which codes are not; use plain LoRA"
            )
        with warnings.catch_warnings():  # peft says of every class that it has not met that it has not met it
            warnings.filterwarnings("ignore", "Unsupported layer type")
            LoraLayer.__init__(self, base_layer, **options)
        own: Any = self
        own._active_adapter = adapter_name
        own.update_layer(adapter_name, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer and what is active beside it."""
        own: Any = self  # attributes are peft's, which torch's annotations do not know
        y: Tensor = own.base_layer(x)
        if own.disable_adapters:
            return y
        for name in own.active_adapters:
            if name in own.lora_A:
                down, up = own.lora_A[name], own.lora_B[name]
                beside = up(down(own.lora_dropout[name](x.to(down.weight.dtype))))
                y = y + (beside * own.scaling[name]).to(y.dtype)
        return y

    def merge(self, *_: Any, **__: Any) -> None:
        """Refused: codes cannot take an adapter."""
        raise InputError(
            "an adapter cannot be merged into codes; load the checkpoint, call `model.dequantize()` and put the adapter on that"
        )

    def unmerge(self) -> None:
        """Nothing is ever merged."""
