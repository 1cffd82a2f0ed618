"""Rotary frequencies of a model, in the arithmetic of transformers' `modeling_rope_utils` but without importing it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anybit.engine.architectures import Config

Floats = NDArray[Any]
Scaling = Callable[[Floats, Config], tuple[Floats, float]]
"""From the plain wavelengths over 2 pi, float32 [pairs], and the settings: frequencies and factor."""


def frequencies(config: Config, layer_type: str | None, tokens: int) -> tuple[Floats, float]:
    """Radians per position float32 [pairs] and the factor on sines and cosines, for one type of layer.

    Args:
        config: a config.json that `architectures.refusal` lets through.
        layer_type: key inside `rope_parameters`, or None when there is one setting for all layers.
        tokens: the longest sequence that will run. Long-context RoPE has two tables, one for texts longer than the
            model was trained on; the choice must not change while a text grows, or earlier keys would no longer fit.
    """
    settings = {**_settings(config, layer_type), "tokens": tokens}
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    dim = int(head_dim * settings["partial_rotary_factor"])
    share = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    wavelengths = (settings["rope_theta"] ** share.astype(np.float64)).astype(
        np.float32
    )  # PyTorch's power, nearly always
    inverse, factor = SCALINGS[settings["rope_type"]](wavelengths, settings)
    return inverse.astype(np.float32), factor


def _settings(config: Config, layer_type: str | None) -> dict[str, Any]:
    """One layer type's `rope_parameters` with what a config.json may say elsewhere, or not at all."""
    parameters = config["rope_parameters"]
    found = dict(parameters if layer_type is None else parameters[layer_type])
    trained = config.get("original_max_position_embeddings") or found.get("original_max_position_embeddings")
    found["original_max_position_embeddings"] = trained or config["max_position_embeddings"]
    found["context"] = config["max_position_embeddings"]
    found.setdefault("rope_type", "default")
    found.setdefault("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)
    return found


def _default(wavelengths: Floats, _: Config) -> tuple[Floats, float]:
    return 1 / wavelengths, 1.0


def _linear(wavelengths: Floats, settings: Config) -> tuple[Floats, float]:
    """Positions squeezed by `factor`."""
    return 1 / wavelengths / np.float32(settings["factor"]), 1.0


def _llama3(wavelengths: Floats, settings: Config) -> tuple[Floats, float]:
    """Long waves squeezed by `factor`, short ones kept, a ramp between."""
    plain = 1 / wavelengths
    trained, low, high = (
        settings[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    turns = np.float32(trained) / (np.float32(2 * math.pi) / plain)  # of a wave within the trained context
    smooth = np.clip((turns - np.float32(low)) / np.float32(high - low), 0, 1)
    return (1 - smooth) * plain / np.float32(settings["factor"]) + smooth * plain, 1.0


def _yarn(wavelengths: Floats, settings: Config) -> tuple[Floats, float]:
    """YaRN: waves that turn rarely within the trained context are squeezed, a ramp over pairs between `beta_fast` and
    `beta_slow` turns (arXiv 2309.00071)."""
    trained, dim = settings["original_max_position_embeddings"], 2 * len(wavelengths)
    factor = settings.get("factor") or settings["context"] / trained
    ends = [
        dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(settings["rope_theta"]))
        for turns in (settings.get("beta_fast") or 32, settings.get("beta_slow") or 1)
    ]
    if settings.get("truncate", True):
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    low, high = max(ends[0], 0), min(ends[1], dim - 1)
    pairs = np.arange(dim // 2, dtype=np.float32)
    squeezed = np.clip((pairs - np.float32(low)) / np.float32(high - low if high != low else 0.001), 0, 1)
    mixed = 1 / (np.float32(factor) * wavelengths) * squeezed + 1 / wavelengths * (1 - squeezed)
    return mixed, float(settings.get("attention_factor") or _yarn_factor(settings, factor))


def _yarn_factor(settings: Config, factor: float) -> float:
    def growth(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    top, bottom = settings.get("mscale"), settings.get("mscale_all_dim")
    return growth(top) / growth(bottom) if top and bottom else growth(1.0)


def _longrope(wavelengths: Floats, settings: Config) -> tuple[Floats, float]:
    """LongRoPE: a factor for every pair, from one of two lists (arXiv 2402.13753)."""
    trained = settings["original_max_position_embeddings"]
    stretch = settings["long_factor" if settings["tokens"] > trained else "short_factor"]
    factor = settings.get("factor") or settings["context"] / trained
    grown = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    return 1 / (np.array(stretch, np.float32) * wavelengths), float(settings.get("attention_factor") or grown)


SCALINGS: dict[str, Scaling] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
