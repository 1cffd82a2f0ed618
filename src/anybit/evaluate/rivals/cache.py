"""Converted models, kept by what went into them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from anybit.cache import build_once, sampled_sha256

_INPUTS = ("*.safetensors", "config.json", "tokenizer*")


def converted(engine: str, model: Path, build: Callable[[Path], None]) -> Path:
    """The directory that `build(empty_directory)` makes of `model`, made once.

    Args:
        engine: names the engine and everything that changes its output, such as `llama.cpp-Q4_0`.
        model: float Hugging Face directory; the key covers its weights (sampled), configuration and tokenizer.
        build: raises RivalFailed when the engine refuses; nothing is kept then.
    """
    files = sorted({path for pattern in _INPUTS for path in model.glob(pattern)})
    text = "".join(f"{path.name} {sampled_sha256(path)}\n" for path in files)
    return build_once(f"rival-{engine}-{hashlib.sha256(text.encode()).hexdigest()[:16]}", build)


def tree_bytes(directory: Path, pattern: str) -> int:
    """Bytes of the files of `directory` that match."""
    return sum(path.stat().st_size for path in directory.glob(pattern))
