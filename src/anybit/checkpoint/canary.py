"""The canary: logits of the quantized model on a few tokens, stored beside it and asked again after every load.

Hashes prove the bytes; the canary proves the whole way from bytes to logits on this machine: names, layouts, kernels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anybit.checkpoint.partial import write_json
from anybit.errors import FormatError, PromiseError

CANARY = "canary.json"
TOP = 16
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
"""Largest allowed difference of a logit, as a share of the spread (standard deviation) of all logits, by compute
dtype."""


def write_canary(path: Path, ids: Tensor, logits: Tensor) -> None:
    """Store token ids [T] with the `TOP` largest logits of the last position and the spread of all of them; logits
    [V]."""
    top = logits.float().topk(min(TOP, logits.numel()))
    record = {
        "ids": ids.tolist(),
        "top_ids": top.indices.tolist(),
        "top_logits": top.values.tolist(),
        "spread": float(logits.float().std()),
    }
    write_json(path, record)


def check_canary(directory: Path, model: nn.Module) -> float:
    """The largest difference from the stored logits, as a share of their spread.

    Raises:
        FormatError: no canary, or a damaged one.
        PromiseError: the model answers something else than when it was written.
    """
    path = directory / CANARY
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        ids, top_ids = torch.tensor([record["ids"]]), torch.tensor(record["top_ids"])
        expected, spread = torch.tensor(record["top_logits"]), float(record["spread"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path} is missing or damaged ({error}); restore it or quantize again") from None
    dtype, device = next((p.dtype, p.device) for p in model.parameters() if p.is_floating_point() and p.dim() == 1)
    with torch.inference_mode():
        logits = model(input_ids=ids.to(device), use_cache=False).logits[0, -1].float().cpu()
    difference = float((logits[top_ids] - expected).abs().max() / max(spread, 1e-30))
    if not difference <= TOLERANCE.get(dtype, 0.2):
        raise PromiseError(
            f"{directory}: the loaded model does not answer as when it was written (canary logits off by "
            f"{difference:.3g} of "
            f"their spread, {TOLERANCE.get(dtype, 0.2)} allowed); run `anybit doctor`"
        )
    return difference
