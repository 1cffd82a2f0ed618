"""Tiny random models of every supported family: two blocks, hidden 64, a working tokenizer, seconds to use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

SPECIALS = ["<pad>", "<s>", "</s>", "<unk>"]
VOCAB = 256 + len(SPECIALS)
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_COMMON = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, **_IDS}
_GATED = {**_COMMON, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 128}
_MOE = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**_GATED),
    "mistral": lambda: tf.MistralConfig(**_GATED, sliding_window=16),
    "qwen2": lambda: tf.Qwen2Config(**_GATED),
    "qwen3": lambda: tf.Qwen3Config(**_GATED, head_dim=16),
    "gemma2": lambda: tf.Gemma2Config(**_GATED, head_dim=16, query_pre_attn_scalar=16, sliding_window=16),
    "gemma3": lambda: tf.Gemma3TextConfig(**_GATED, head_dim=16, query_pre_attn_scalar=16, sliding_window=16),
    "phi3": lambda: tf.Phi3Config(**_GATED),
    "opt": lambda: tf.OPTConfig(**_COMMON, ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=128),
    "falcon": lambda: tf.FalconConfig(**_COMMON, multi_query=True, alibi=False, bias=False),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**_COMMON, intermediate_size=128, max_position_embeddings=128),
    "gpt2": lambda: tf.GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=128, **_IDS),
    "bloom": lambda: tf.BloomConfig(vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4, **_IDS),
    "mixtral": lambda: tf.MixtralConfig(**_GATED, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": lambda: tf.Qwen2MoeConfig(**_GATED, **_MOE, shared_expert_intermediate_size=96),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**_GATED, **_MOE, head_dim=16),
}


def tiny(family: str, seed: int = 0, **overrides: Any) -> Any:
    """A float32 model in eval mode; `overrides` are set on the config. No weight, gain or bias is left at 0 or 1."""
    config = FAMILIES[family]()
    for name, value in overrides.items():
        setattr(config, name, value)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.copy_(_value(name, parameter, draw))
    return model


def _value(name: str, parameter: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    noise = torch.randn(parameter.shape, generator=draw)
    if parameter.dim() == 1:
        centre = parameter.mean() if name.endswith("weight") else 0.0  # gain 1, or 0 where the model adds the 1
        return centre + 0.2 * noise
    return noise * (0.3 if "embed" in name else parameter.shape[-1] ** -0.5)


def tiny_tokenizer() -> Any:
    """Byte-level, one token per byte, after four special tokens; ids fit a vocabulary of `VOCAB`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIALS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def save_tiny(
    family: str, directory: str | Path, *, seed: int = 0, max_shard_size: str = "5GB", **overrides: Any
) -> Any:
    """Saves model and tokenizer under `directory`, as `save_pretrained` does, and returns the model."""
    model = tiny(family, seed, **overrides)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(directory)
    return model


def token_ids(tokens: int = 12, seed: int = 0) -> torch.Tensor:
    """Random token ids, int64 [1, tokens], no specials."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIALS), VOCAB, (1, tokens), generator=draw)


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """[1, T, vocab] without gradients or cache."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits
