"""The empirical Fisher diagonal: F = sum over calibration sequences of (d loss / d W)^2, for every linear that asks for it.

The loss is the mean cross-entropy of each next token of one sequence. This is the one statistic that needs the whole float
model in memory: its weights, F, and per sequence in flight the gradients and activations of a backward pass. It is taken
once, before the first block; each block's part goes to a file of its own, so that a resumed run need not repeat it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from anybit.calibration.parallel import Workers
from anybit.checkpoint.partial import write_shard
from anybit.models.source import ModelSource


def write_fisher(
    source: ModelSource,
    linears: Mapping[str, Sequence[str]],
    files: Mapping[str, Path],
    tokens: Tensor,
    pool: Workers,
    in_flight: int,
) -> None:
    """F of the `linears` of each block in `files`, as one safetensors file a block: linear name -> float32 [N, K].

    `tokens` int64 [samples, T]; `in_flight` sequences go backward at once. Files appear whole or not at all.
    """
    model = source.skeleton()
    source.load_into(model, "")
    found = fisher(model, [name for block in files for name in linears[block]], tokens, pool, in_flight)
    for block, path in files.items():
        write_shard(path, {name: found[name] for name in linears[block]})


def fisher(
    model: nn.Module, linears: Sequence[str], tokens: Tensor, pool: Workers, in_flight: int
) -> dict[str, Tensor]:
    """F float32 [N, K] of each named linear of a whole float32 `model`; independent of the number of threads.

    A linear that no token reached (an expert) has F = 0.
    """
    weights = {name: model.get_parameter(f"{name}.weight") for name in linears}
    for weight in weights.values():
        weight.requires_grad_()
    total = {name: torch.zeros_like(weight, requires_grad=False) for name, weight in weights.items()}

    def gradients(ids: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
            loss = nn.functional.cross_entropy(logits[:-1].float(), ids[1:])
            return torch.autograd.grad(loss, list(weights.values()), allow_unused=True)

    for start in range(0, len(tokens), in_flight):
        for found in pool.map(gradients, tokens[start : start + in_flight]):
            for name, gradient in zip(weights, found, strict=True):
                if gradient is not None:
                    total[name].addcmul_(gradient, gradient)
    return total
