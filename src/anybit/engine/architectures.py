"""What a Llama-like model computes, read from its config.json: the one place that tells architectures apart.

All of them are the same decoder with a few switches, so a new one is a line of `_FAMILIES` (and, if it needs a switch
that none has, a field of `Architecture`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from anybit.errors import FormatError

Config = Mapping[str, Any]
_ACTIVATIONS = {"silu": False, "gelu_pytorch_tanh": True}
_ROPES = ("default", "linear", "llama3", "yarn", "longrope")
"""Those of `engine/rope.py`."""


@dataclass(frozen=True)
class Family:
    """How one `model_type` differs from Llama.

    Attributes:
        gemma: norms multiply by 1 + weight, a second norm follows each sublayer, embeddings are scaled by sqrt(hidden),
            scores by query_pre_attn_scalar^-0.5.
        head_norm: queries and keys are normalized head by head.
        fused: q, k, v are one linear, gate and up too.
        score_cap: attention scores are soft-capped by `attn_logit_softcapping`.
    """

    gemma: bool = False
    head_norm: bool = False
    fused: bool = False
    score_cap: bool = False


_FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(head_norm=True),
    "gemma2": Family(gemma=True, score_cap=True),
    "gemma3_text": Family(gemma=True, head_norm=True),
    "phi3": Family(fused=True),
}


@dataclass(frozen=True)
class Architecture:
    """Sizes and switches of one model.

    Attributes:
        windows: per layer, how many positions a token sees, itself included; 0 for all.
        rope_types: per layer, the key of its rotary table in `rope_parameters`, or None where there is only one.
        context: longest sequence, `max_position_embeddings`.
        tied: the head is the embedding's table.
        gelu: tanh-approximated GELU in place of SiLU.
    """

    family: Family
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    context: int
    epsilon: float
    tied: bool
    gelu: bool
    embedding_scale: float
    attention_scale: float
    attention_softcap: float
    logit_softcap: float
    windows: tuple[int, ...]
    rope_types: tuple[str | None, ...]


def refusal(config: Config) -> str:
    """Why a model of this configuration cannot run in the native decoder; empty when it can."""
    kind = config.get("model_type")
    if kind not in _FAMILIES:
        return f"architecture '{kind}' is not one of {', '.join(_FAMILIES)}"
    if config.get("use_bidirectional_attention"):
        return "its attention looks ahead (use_bidirectional_attention)"
    activation = _activation(config)
    if activation not in _ACTIVATIONS:
        return f"activation '{activation}' is not one of {', '.join(_ACTIVATIONS)}"
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if head_dim % 16:
        return f"head_dim {head_dim} is not a multiple of 16"
    for kind in (part.get("rope_type", "default") for part in _rope_parts(config)):
        if "dynamic" in kind:
            return "dynamic RoPE changes the keys of earlier tokens as a text grows"
        if kind not in _ROPES:
            return f"RoPE of type '{kind}' is not one of {', '.join(_ROPES)}"
    return ""


def architecture(config: Config) -> Architecture:
    """Sizes and switches from a config.json for which `refusal` is empty.

    Raises:
        FormatError: a field is missing.
    """
    try:
        return _architecture(config, _FAMILIES[config["model_type"]])
    except KeyError as error:
        raise FormatError(f"config.json has no {error}; restore it or quantize again") from None


def _architecture(config: Config, family: Family) -> Architecture:
    hidden, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
    head_dim = config.get("head_dim") or hidden // heads
    kinds: list[str | None] = list(config.get("layer_types") or [None] * layers)
    window = (config.get("use_sliding_window", True) and config.get("sliding_window")) or 0
    return Architecture(
        family=family,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        intermediate=config["intermediate_size"],
        vocab=config["vocab_size"],
        context=config["max_position_embeddings"],
        epsilon=config["rms_norm_eps"],
        tied=bool(config.get("tie_word_embeddings", family.gemma)),
        gelu=_ACTIVATIONS[_activation(config)],
        embedding_scale=hidden**0.5 if family.gemma else 1.0,
        attention_scale=(config["query_pre_attn_scalar"] if family.gemma else head_dim) ** -0.5,
        attention_softcap=(family.score_cap and config.get("attn_logit_softcapping")) or 0.0,
        logit_softcap=config.get("final_logit_softcapping") or 0.0,
        windows=tuple(window if kind in (None, "sliding_attention") else 0 for kind in kinds),
        rope_types=tuple(kind if kind in config["rope_parameters"] else None for kind in kinds),
    )


def _activation(config: Config) -> str:
    return config.get("hidden_activation") or config.get("hidden_act") or "silu"


def _rope_parts(config: Config) -> list[Config]:
    """The rotary settings: one, or one for each type of layer."""
    parameters = config.get("rope_parameters") or {}
    return [part for part in parameters.values() if isinstance(part, dict)] or [parameters]
