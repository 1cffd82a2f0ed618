"""A checkpoint opened on the engine that can run it."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from anybit.checkpoint.layout import read_config
from anybit.engine import build
from anybit.engine.native import NativeModel
from anybit.errors import InputError

ENGINES = ("auto", "native", "torch")
log = logging.getLogger("anybit")


def open_engine(
    directory: str | Path, engine: str = "auto"
) -> tuple[PreTrainedModel | NativeModel, PreTrainedTokenizerBase]:
    """A model that `engine.generate` runs, with its tokenizer.

    Args:
        directory: what `anybit quantize` wrote.
        engine: `native`, `torch`, or `auto`: native where it can, else torch with a warning that says why.

    Raises:
        InputError: unknown engine. KernelUnavailable: `native` cannot run this model. Others: those of `anybit.load`.
    """
    if engine not in ENGINES:
        raise InputError(f"unknown engine '{engine}'; known: {', '.join(ENGINES)}")
    if engine == "auto" and (reason := native_refusal(Path(directory))):
        log.warning("the torch engine runs this model, more slowly: %s", reason)
        engine = "torch"
    if engine == "torch":
        from anybit.loading import load_any

        return load_any(directory)
    return NativeModel.open(directory), AutoTokenizer.from_pretrained(directory, local_files_only=True)


def native_refusal(directory: Path) -> str:
    """Why the native decoder cannot run a checkpoint; empty where it can."""
    config = read_config(directory)
    return build.refusal(config, config["quantization_config"]["layers"])
