"""The key-value part of a GGUF file: hyperparameters and vocabulary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from anybit.integrations.exchange.account import Account

# What splits text before byte-level BPE: a mark in tokenizer.json's pre_tokenizer -> llama.cpp's name for all of it.
_DIGITS_ALONE, _THREE_DIGITS, _ONE_DIGIT = '"Digits"', r"\\p{N}{1,3}", r"\\p{N}"


def write_metadata(
    writer: gguf.GGUFWriter, config: Mapping[str, Any], directory: Path, account: Account
) -> NDArray[np.float32] | None:
    """Everything but tensors. Returns the factors of the rotary frequencies float32 [head_dim / 2] where the model changes them:
    they are a tensor.

    Raises:
        InputError: a rotary scheme or a vocabulary that is not known here.
    """
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    rope = config.get("rope_parameters") or {}
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0))
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(int(config["vocab_size"]))
    _check_arithmetic(config, account)
    writer.add_file_type(gguf.LlamaFileType.GUESSED)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _vocabulary(writer, directory, int(config["vocab_size"]), account)
    return _rope_factors(config, rope.get("rope_type", "default"), account)


def _check_arithmetic(config: Mapping[str, Any], account: Account) -> None:
    """What llama.cpp computes for these architectures whatever the file says."""
    if config.get("hidden_act") != "silu":
        raise account.refuse(f"the activation function {config.get('hidden_act')}", "config.json")
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        account.lose(f"attention within {config['sliding_window']} tokens; llama.cpp attends to all", "config.json")


def _rope_factors(config: Mapping[str, Any], kind: str, account: Account) -> NDArray[np.float32] | None:
    """llama.cpp divides every frequency by its factor."""
    if kind == "default":
        return None
    if kind != "llama3":
        raise account.refuse(f"rotary embeddings of type '{kind}' (default and llama3 are known here)", "config.json")
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    found = AutoConfig.for_model(**{k: v for k, v in config.items() if k != "quantization_config"})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](found, torch.device("cpu"))
    width = 2 * len(scaled)
    plain = 1.0 / (float(found.rope_parameters["rope_theta"]) ** (torch.arange(0, width, 2).float() / width))
    return (plain / scaled.float()).numpy()


def _vocabulary(writer: gguf.GGUFWriter, directory: Path, size: int, account: Account) -> None:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise account.refuse("a model without tokenizer.json", str(directory))
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    model = tokenizer["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise account.refuse(f"this {model.get('type')} vocabulary; byte-level BPE is known here", str(path))
    tokens = {index: (token, gguf.TokenType.NORMAL) for token, index in model["vocab"].items()}
    for added in tokenizer.get("added_tokens", []):
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]] = (added["content"], kind)
    padding = [(f"[PAD{index}]", gguf.TokenType.UNUSED) for index in range(size)]
    rows = [tokens.get(index, padding[index]) for index in range(size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_splitter(tokenizer, account, path))
    writer.add_token_list([token for token, _ in rows])
    writer.add_token_types([kind for _, kind in rows])
    gguf.SpecialVocab(directory, load_merges=True, n_vocab=size).add_to_gguf(writer, quiet=True)


def _splitter(tokenizer: Mapping[str, Any], account: Account, path: Path) -> str:
    """llama.cpp's name for how text is split before BPE."""
    text = json.dumps(tokenizer.get("pre_tokenizer") or {})
    if _THREE_DIGITS in text:
        return "llama-bpe"
    if _ONE_DIGIT in text:
        return "qwen2"
    if '"ByteLevel"' in text and '"Split"' not in text:
        return "smollm" if _DIGITS_ALONE in text else "gpt-2"
    account.lose("this way of splitting text into words; llama.cpp's default is named", str(path))
    return "default"
