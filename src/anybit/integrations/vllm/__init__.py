"""vLLM serves anybit checkpoints: `vllm serve DIR`, no flags (docs/vllm.md).

vLLM finds `register` through the entry point `vllm.general_plugins` and calls it in every process that it starts.
"""

from __future__ import annotations


def register() -> None:
    """Make `quant_method: anybit` known to vLLM; calling it again does nothing."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    from anybit.checkpoint.layout import METHOD

    if METHOD not in QUANTIZATION_METHODS:
        from anybit.integrations.vllm.config import AnybitConfig

        register_quantization_config(METHOD)(AnybitConfig)
