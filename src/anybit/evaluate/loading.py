"""One way to get a runnable model from anything the command line accepts as MODEL."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from anybit.checkpoint.layout import METHOD
from anybit.errors import InputError, nearest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_any(model: str | Path, *, dtype: str = "float32") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in eval mode on the CPU, with its tokenizer.

    Args:
        model: an anybit directory (loaded with its checks), or whatever `anybit.models.source.open_model` takes.
        dtype: of the floating-point parts, a key of `DTYPES`.

    Raises:
        InputError: unknown dtype, or a model that cannot be found or read.
    """
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype '{dtype}'{nearest(dtype, DTYPES)}")
    if is_anybit_directory(model):
        from anybit.loading import load

        return load(str(model), dtype=DTYPES[dtype]).eval(), AutoTokenizer.from_pretrained(model, local_files_only=True)
    from anybit.models.source import open_model

    source = open_model(str(model))
    loaded = AutoModelForCausalLM.from_pretrained(source.path, dtype=DTYPES[dtype], local_files_only=True)
    return loaded.eval(), source.tokenizer()


def is_anybit_directory(model: str | Path) -> bool:
    """Whether `model` is a checkpoint that anybit wrote, by what its config.json says."""
    config = Path(model) / "config.json"
    if not config.is_file():
        return False
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"'{config}' is not JSON ({error}); the checkpoint is damaged, write it again") from error
    return (settings.get("quantization_config") or {}).get("quant_method") == METHOD
