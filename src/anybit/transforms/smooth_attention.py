"""SmoothAttention (QoQ, arXiv 2405.04532): move outlier channels of keys into queries, so that a key cache quantizes.

lambda_i = a_i^alpha with a_i the reach of key channel i over calibration tokens; rows of the key projection (and its bias) are
divided by lambda, rows of the query projection multiplied: scores stay. One lambda a key/value head serves all its query
heads. RoPE turns pairs of channels, so both of a pair share one lambda; here a_i of a pair is max over tokens of
sqrt(k_i^2 + k_j^2), which RoPE does not change (the paper takes the larger maximum after RoPE, at most a factor sqrt 2 less).
Which channels are pairs is found by trying powers of two on the block. Where queries and keys are normed (Qwen 3, Gemma 3)
the gains of those norms are scaled, one lambda for all heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from anybit.calibration.activations import Activations
from anybit.calibration.parallel import Workers
from anybit.calibration.statistics import BlockCall
from anybit.models.graph import BlockGraph
from anybit.transforms.base import Transform
from anybit.transforms.heads import QueryKey, query_key_pairs
from anybit.transforms.stream import gain_of
from anybit.transforms.trial import Trial


class SmoothAttention(Transform):
    """Option: `alpha`, the paper's 0.5."""

    name: ClassVar[str] = "smooth-attention"
    alpha: float = Field(default=0.5, ge=0, le=1)

    def apply(self, call: BlockCall, graph: BlockGraph, source: Activations, pool: Workers) -> list[str]:
        """Rescale queries and keys; a note, or none where no pair of modules allows it."""
        trial = Trial(call, source)
        for pair in query_key_pairs(call.block, graph):
            for word, ties in layouts(pair.head_dim):
                if not _holds(trial, pair, ties):
                    continue
                reach = self._reach(call, source, pair, ties, pool)
                factors = torch.where(reach > 0, reach, 1.0).pow(self.alpha)
                factors = factors if bool(torch.isfinite(factors).all()) else torch.ones_like(factors)
                scale(call.block, pair, factors)
                span = f"{float(factors.min()):.3g} to {float(factors.max()):.3g}, {word}"
                return [f"{pair.key}: outputs divided by {span}; {pair.query}: multiplied"]
        return []

    def _reach(self, call: BlockCall, source: Activations, pair: QueryKey, ties: Tensor, pool: Workers) -> Tensor:
        """a float32 [kv_heads, head_dim], equal within ties."""

        def largest(sample: int) -> Tensor:
            keys = _output(call, pair.key, source.read(sample))
            keys = keys.reshape(-1, pair.key_width(call.block))[:, pair.key_rows.reshape(-1)]
            squares = keys.view(-1, *pair.key_rows.shape).square()
            sums = torch.zeros_like(squares).index_add_(-1, ties, squares)
            return sums.amax(0).sqrt()[:, ties]

        return torch.stack(pool.map(largest, range(source.samples))).amax(0)


def layouts(size: int) -> Iterator[tuple[str, Tensor]]:
    """Which channels of a head share a factor, freest first: int64 [head_dim], the first channel of each one's tie."""
    own = torch.arange(size)
    yield "every channel on its own", own
    for turned in (size // 4, size // 2, size):
        if turned >= 2 and turned % 2 == 0:
            head = own[:turned]
            yield f"channels i and i + {turned // 2} tied", torch.cat([head % (turned // 2), own[turned:]])
            yield f"channels 2i and 2i + 1 of {turned} tied", torch.cat([head // 2 * 2, own[turned:]])


def scale(block: nn.Module, pair: QueryKey, factors: Tensor) -> None:
    """Multiply query rows by `factors` float [kv_heads, head_dim] (each for all its query heads), divide key rows by them."""
    repeat = len(pair.query_rows) // len(pair.key_rows)
    _multiply(block.get_submodule(pair.query), pair.query_rows, factors.repeat_interleave(repeat, 0))
    _multiply(block.get_submodule(pair.key), pair.key_rows, 1 / factors)


def _multiply(module: nn.Module, rows: Tensor, factors: Tensor) -> None:
    index, by = rows.reshape(-1), factors.reshape(-1)
    if module.get_parameter("weight").dim() == 1 and not gain_of(module)[1]:
        weight = module.get_parameter("weight")
        weight[index] = (1 + weight[index]) * by - 1
        return
    for parameter in module.parameters():
        parameter[index] *= by.view(-1, *[1] * (parameter.dim() - 1))


def _holds(trial: Trial, pair: QueryKey, ties: Tensor) -> bool:
    """Whether factors tied so keep the block: tried with random powers of two, and taken back."""
    draw = torch.Generator().manual_seed(0)
    factors = (2.0 ** torch.randint(-2, 3, tuple(pair.key_rows.shape), generator=draw))[:, ties]
    block = trial.call.block
    if not trial.keeps((pair.query, pair.key), partial(scale, block, pair, factors)):
        return False
    with torch.no_grad():
        scale(block, pair, 1 / factors)
    return True


def _output(call: BlockCall, name: str, hidden: Tensor) -> Tensor:
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: Any, out: Tensor) -> None:
        seen.append(out.detach())

    handle = call.block.get_submodule(name).register_forward_hook(keep)
    try:
        call.run(hidden)
    finally:
        handle.remove()
    return seen[0]
