"""What transformers makes of a tokenizer.json: some classes follow it, others keep its vocabulary and its post-processor and
build the rest themselves. The facts are those of transformers 5 (`models/*/tokenization_*.py`, `tokenization_auto.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

AS_WRITTEN = "TokenizersBackend"
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def in_charge(declared: str | None, model_type: str | None, backend: Tokenizer) -> str:
    """The class that reads a tokenizer: the declared one, unless transformers knows better.

    Args:
        declared: `tokenizer_class` of tokenizer_config.json.
        model_type: of config.json.
        backend: tokenizer.json as it is.
    """
    name = (declared or "").removesuffix("Fast")
    if model_type == "qwen2":
        return "Qwen2Tokenizer"
    if model_type in ("phi3", "mistral") or name in ("TokenizersBackend", "PreTrainedTokenizer"):
        return AS_WRITTEN
    if name == "LlamaTokenizer" and "ByteLevel" in repr(backend.pre_tokenizer):
        return AS_WRITTEN
    return name or "tokenizer of no class"


def rebuild(kind: str, backend: Tokenizer, config: Mapping[str, Any]) -> dict[str, str | None]:
    """Change a backend as the class `kind` does; returns the special tokens that the class has without being told."""
    return dict(REBUILT[kind](backend, config)) if kind in REBUILT else {}


def _llama(backend: Tokenizer, config: Mapping[str, Any]) -> dict[str, str]:
    prefix = config.get("add_prefix_space")
    prefix = True if prefix is None else prefix
    scheme = "never" if not prefix else "always" if config.get("legacy", False) else "first"
    _set_model(backend, fuse_unk=True, byte_fallback=True)
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(content=" ", left=1)] if prefix else steps)
    return {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def _gemma(backend: Tokenizer, _: Mapping[str, Any]) -> dict[str, str]:
    names = {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    _set_model(backend, fuse_unk=True, byte_fallback=True, unk_token="<unk>")
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(pattern=" ", behavior="merged_with_previous", invert=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return {**names, "mask_token": "<mask>"}


def _qwen2(backend: Tokenizer, config: Mapping[str, Any]) -> dict[str, str]:
    prefix = bool(config.get("add_prefix_space"))
    _set_model(backend)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_WORDS), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>")


def _gpt2(backend: Tokenizer, config: Mapping[str, Any]) -> dict[str, str]:
    _set_model(backend)
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space")))
    backend.decoder = decoders.ByteLevel()
    return dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>")


def _set_model(
    backend: Tokenizer, *, fuse_unk: bool = False, byte_fallback: bool = False, unk_token: str | None = None
) -> None:
    model: Any = backend.model
    model.dropout, model.ignore_merges = None, False
    model.fuse_unk, model.byte_fallback, model.unk_token = fuse_unk, byte_fallback, unk_token


REBUILT: dict[str, Callable[[Tokenizer, Mapping[str, Any]], dict[str, str]]] = {
    "LlamaTokenizer": _llama,
    "GemmaTokenizer": _gemma,
    "Qwen2Tokenizer": _qwen2,
    "GPT2Tokenizer": _gpt2,
}
