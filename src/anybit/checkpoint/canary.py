"""The canary: logits of the quantized model on a few tokens, stored beside it and asked again after every load.

Hashes prove the bytes; the canary proves the whole way from bytes to logits on this machine: names, layouts, kernels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
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


NOISE = 1e-6
"""Relative change of the first hidden states that makes an echo: the size of float32 rounding."""
MARGIN = 2.0


def echoes(hidden: Tensor, count: int) -> list[Tensor]:
    """`hidden` float32 (any shape) with `NOISE` on it, `count` times. Where activations are quantized, another order of the same
    float additions moves values across rounding borders, and logits by far more than rounding: echoes measure by how much."""
    draw = torch.Generator().manual_seed(0)
    return [hidden * (1 + NOISE * torch.randn(hidden.shape, generator=draw)) for _ in range(count)]


def write_canary(path: Path, ids: Tensor, logits: Tensor, echoed: Sequence[Tensor] = ()) -> None:
    """Store token ids [T] with the `TOP` largest logits of the last position and the spread of all of them; logits [V].

    `echoed` are the logits [V] of `echoes`: `MARGIN` times the largest difference they show is stored as allowed.
    """
    top = logits.float().topk(min(TOP, logits.numel()))
    moved = max((float((echo - logits)[top.indices].abs().max()) for echo in echoed), default=0.0)
    record = {
        "ids": ids.tolist(),
        "top_ids": top.indices.tolist(),
        "top_logits": top.values.tolist(),
        "spread": float(logits.float().std()),
    }
    if echoed:
        record["allowed"] = MARGIN * moved / max(float(logits.float().std()), 1e-30)
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
        echoed = float(record.get("allowed", 0.0))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path} is missing or damaged ({error}); restore it or quantize again") from None
    dtype, device = next((p.dtype, p.device) for p in model.parameters() if p.is_floating_point() and p.dim() == 1)
    with torch.inference_mode():
        logits = model(input_ids=ids.to(device), use_cache=False).logits[0, -1].float().cpu()
    difference = float((logits[top_ids] - expected).abs().max() / max(spread, 1e-30))
    allowed = max(TOLERANCE.get(dtype, 0.2), echoed)
    if not difference <= allowed:
        raise PromiseError(
            f"{directory}: the loaded model does not answer as when it was written (canary logits off by "
            f"{difference:.3g} of their spread, {allowed:.3g} allowed); run `anybit doctor`"
        )
    return difference
