"""Open an anybit checkpoint as a transformers model, with its files and its answers checked."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from anybit.checkpoint.canary import check_canary
from anybit.checkpoint.layout import read_config
from anybit.checkpoint.verify import verify as verify_files
from anybit.errors import InputError


def load(directory: str | Path, *, dtype: torch.dtype = torch.float32, verify: bool = True) -> PreTrainedModel:
    """An anybit checkpoint as a transformers model in eval mode, on the CPU, with its files and answers checked.

    Args:
        directory: what `quantize` wrote.
        dtype: of activations and of everything kept in float.
        verify: compare every tensor with the ledger's sha256 first (reads the whole checkpoint).

    Raises:
        InputError: no such directory. FormatError: damaged or altered files. PromiseError: the canary's logits differ.
    """
    path = Path(directory)
    if not path.is_dir():
        raise InputError(f"{directory}: no such directory; give one that `anybit quantize` wrote")
    read_config(path)
    if verify:
        verify_files(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True, trust_remote_code=False)
    model.eval()
    check_canary(path, model)
    return model
