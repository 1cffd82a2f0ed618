"""A checkpoint opened on the engine that can run it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from anybit.checkpoint.layout import read_config
from anybit.engine import build
from anybit.engine.native import NativeModel
from anybit.engine.tokenizer import Tokenizer, open_tokenizer
from anybit.errors import InputError
from anybit.formats.kv import KVSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ENGINES = ("auto", "native", "torch")
log = logging.getLogger("anybit")


def open_engine(
    directory: str | Path, engine: str = "auto", kv: KVSpec | None = None
) -> tuple[PreTrainedModel | NativeModel, PreTrainedTokenizerBase | Tokenizer]:
    """A model that `engine.generate` runs, with its tokenizer.

    Args:
        directory: what `anybit quantize` wrote.
        kv: how keys and values are cached; default: what the checkpoint says, else 8 bits natively and unquantized in torch.
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

        model, tokenizer = load_any(directory)
        if kv is not None:
            from anybit.layers.kv_cache import cache_as

            cache_as(model, kv)
        return model, tokenizer
    return NativeModel.open(directory, kv=kv), open_tokenizer(Path(directory))


def native_refusal(directory: Path) -> str:
    """Why the native decoder cannot run a checkpoint; empty where it can."""
    config = read_config(directory)
    return build.refusal(config, config["quantization_config"]["layers"])
