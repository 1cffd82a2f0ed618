"""Open a model: an anybit checkpoint with its files and its answers checked, or anything the command line takes as MODEL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from anybit.checkpoint.canary import check_canary
from anybit.checkpoint.layout import METHOD, read_config
from anybit.checkpoint.verify import verify as verify_files
from anybit.errors import InputError, nearest
from anybit.layers.precision import Precision
from anybit.models.source import open_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    directory: str | Path, precision: int | None = None, *, dtype: torch.dtype = torch.float32, verify: bool = True
) -> PreTrainedModel:
    """An anybit checkpoint as a transformers model in eval mode, on the CPU, with its files and answers checked.

    `model.precision` is its `anybit.layers.precision.Precision`; setting `model.precision.bits` switches a nested model.

    Args:
        directory: what `quantize` wrote.
        precision: bits to run nested weights with; default: all that are stored.
        dtype: of activations and of everything kept in float.
        verify: compare every tensor with the ledger's sha256 first (reads the whole checkpoint).

    Raises:
        InputError: no such directory, or a precision that the checkpoint does not hold. FormatError: damaged or altered
            files. PromiseError: the canary's logits differ.
    """
    path = Path(directory)
    if not path.is_dir():
        raise InputError(f"{directory}: no such directory; give one that `anybit quantize` wrote")
    read_config(path)
    if verify:
        verify_files(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True, trust_remote_code=False)
    model.eval()
    check_canary(path, model)  # at full width, as when it was written
    if precision is not None:
        cast(Precision, model.precision).bits = precision
    return model


def load_any(
    model: str | Path, *, dtype: str = "float32", precision: int | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in eval mode on the CPU, with its tokenizer.

    Args:
        model: an anybit directory (loaded with its checks), or whatever `anybit.models.source.open_model` takes.
        dtype: of the floating-point parts, a key of `DTYPES`.
        precision: as for `load`; only an anybit directory has one.

    Raises:
        InputError: unknown dtype, a precision that the model does not hold, or a model that cannot be found or read.
    """
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype '{dtype}'{nearest(dtype, DTYPES)}")
    if is_anybit_directory(model):
        loaded = load(str(model), precision, dtype=DTYPES[dtype])
        return loaded, AutoTokenizer.from_pretrained(model, local_files_only=True)
    if precision is not None:
        raise InputError(f"{model} is not an anybit checkpoint, it has no precision {precision}; leave it out")
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
