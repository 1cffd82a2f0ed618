"""Rotary frequencies of a model, as transformers computes them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from anybit.engine.architectures import Config


def frequencies(directory: Path, config: Config, layer_type: str | None, tokens: int) -> tuple[Tensor, float]:
    """Radians per position float32 [pairs] and the factor on sines and cosines, for one type of layer.

    Args:
        directory: the checkpoint, whose configuration transformers is asked about unless RoPE is the plain one.
        config: its config.json.
        layer_type: key inside `rope_parameters`, or None when there is one setting for all layers.
        tokens: the longest sequence that will run. Long-context RoPE has two tables, one for texts longer than the
            model was trained on; the choice must not change while a text grows, or earlier keys would no longer fit.
    """
    parameters = config["rope_parameters"]
    parameters = parameters if layer_type is None else parameters[layer_type]
    if parameters.get("rope_type", "default") == "default":
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
        return 1.0 / parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim), 1.0
    from transformers import AutoConfig  # plain RoPE starts without transformers' second of imports
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    full = AutoConfig.from_pretrained(directory, local_files_only=True)
    compute = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
    inverse, factor = compute(full, torch.device("cpu"), seq_len=tokens, layer_type=layer_type)
    return inverse.float(), float(factor)
