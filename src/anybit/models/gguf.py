"""GGUF files: dequantized once by transformers, kept as a Hugging Face directory in the cache."""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

from anybit.cache import build_once, sampled_sha256
from anybit.errors import InputError
from anybit.models.gguf_header import check_header

UNREADABLE = "cannot read this GGUF file, it is damaged or unknown here"


def gguf_key(path: Path) -> str:
    """Short name of the file's content: a hash over sampled bytes, size and modification time."""
    stat = path.stat()
    text = f"{sampled_sha256(path)} {stat.st_size} {stat.st_mtime_ns}"
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def converted(path: Path) -> Path:
    """The Hugging Face directory (float32) of a .gguf file, converted at the first call. Raises InputError."""
    check_gguf(path)

    def build(directory: Path) -> None:
        model, tokenizer = load_gguf(path)
        with quiet_transformers():
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)

    return build_once(f"gguf-{gguf_key(path)}", build)


def check_gguf(path: Path) -> None:
    """Raises InputError unless `path` is a file that starts like GGUF version 2 or 3, with a header that fits into it."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with path.open("rb") as file:
        head = file.read(8)
    if len(head) < 8 or head[:4] != b"GGUF":
        raise InputError(f"{path}: not a GGUF file (it does not start with 'GGUF'); download it again")
    version = struct.unpack("<I", head[4:])[0]
    if version not in (2, 3):
        raise InputError(f"{path}: GGUF version {version}; versions 2 and 3 are read, convert it with llama.cpp")
    check_header(path)


def load_gguf(path: Path) -> tuple[Any, Any]:
    """(model, tokenizer): dequantized to float32, whole in memory. Raises InputError for what cannot be read."""
    folder, name = str(path.parent), path.name
    with parsing(path, UNREADABLE):
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            trust_remote_code=False,
        )
    return model.eval(), tokenizer


@contextmanager
def parsing(path: Path, failure: str) -> Iterator[None]:
    """For parsers that raise whatever a wrong byte leads to (KeyError, struct.error, ...): quiet, and InputError `failure` with
    the reason."""
    try:
        with quiet_transformers():
            yield
    except InputError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"{path}: {failure} ({type(error).__name__}: {reason})") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings of transformers inside; as it was before outside.

    The GGUF reader draws its bar with tqdm directly, which no setting turns off: hence the redirected stderr. Failures
    come as exceptions, so nothing that matters is lost.
    """
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
