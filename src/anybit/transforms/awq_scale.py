"""AWQ's scales (Lin et al., arXiv 2306.00978): scale salient input channels up before rounding, by search.

For a producer and the linears W_i reading its output x: with a_j = mean |x_j|, try r = 0, 1/20 .. 19/20, s = max(a^r, 1e-4) /
sqrt(max s * min s), measure the mean squared change of the *inspected module's* output when every W_i is replaced by
Q(W_i s) / s, keep the best r, then divide the producer by s and multiply the columns by s: float output unchanged, s free
at run time. Inspected: the smallest module around all readers of a norm (attention, feed-forward); otherwise the linear
itself. Pairs across grouped-query heads are skipped, as in the reference code.
Reduced: the search measures on `samples` calibration sequences, not on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from anybit.calibration.activations import Activations
from anybit.calibration.parallel import Workers
from anybit.calibration.statistics import BlockCall, collect
from anybit.methods.grid import AffineGrid
from anybit.models.graph import BlockGraph
from anybit.models.pairs import ScalePair, apply_scale, scale_pairs
from anybit.transforms.base import Transform

RATIOS = 20


class AWQScale(AffineGrid, Transform):
    """Options: those of the grid the scales are chosen for, and `samples`, the calibration sequences the search runs
    on."""

    name: ClassVar[str] = "awq-scale"
    samples: int = Field(default=8, ge=1)

    def apply(self, call: BlockCall, graph: BlockGraph, source: Activations, pool: Workers) -> list[str]:
        """Rescale the block in place where the search says it helps; one note per scaled linear."""
        block = call.block
        pairs = [p for p in scale_pairs(block, source.read(0), call.arguments, graph) if _eligible(block, p)]
        firsts = [group.linears[0] for group in graph.groups]
        wanted = [first for first in firsts if any(first in pair.consumers for pair in pairs)]
        statistics = collect(call, source, wanted, frozenset({"mean_abs"}), pool)
        notes = []
        for pair in pairs:
            mean_abs = next(statistics[name].mean_abs for name in pair.consumers if name in statistics)
            assert mean_abs is not None
            probe = _Probe(call, source, _inspected(pair), pair, min(self.samples, source.samples), pool)
            scales = self.search(mean_abs, [_weight(block, name) for name in pair.consumers], probe.loss)
            apply_scale(block, pair, scales)
            span = f"{float(scales.min()):.2f} to {float(scales.max()):.2f}"
            notes += [f"{name}: input scaled by AWQ, {span}" for name in pair.consumers]
        return notes

    def search(self, mean_abs: Tensor, weights: Sequence[Tensor], loss: Callable[[Sequence[Tensor]], float]) -> Tensor:
        """The best scales float32 [K] for `weights` [N_i, K] whose input has mean |x| `mean_abs` [K].

        `loss(replacements)` is the mean squared change of the inspected module's output with these weights in place.
        The ratio 0 is s = 1, so the result is never worse than not scaling, by this measure.
        """
        best, least = torch.ones_like(mean_abs), float("inf")
        for i in range(RATIOS):
            s = mean_abs.pow(i / RATIOS).clamp_min(1e-4)
            s = s / (s.max() * s.min()).sqrt()
            found = loss([self._rounded(weight * s) / s for weight in weights])
            if found < least:
                best, least = s, found
        return best

    def _rounded(self, weight: Tensor) -> Tensor:
        grid = self.fit(weight)
        return grid.decode(grid.encode(weight))


def _eligible(block: nn.Module, pair: ScalePair) -> bool:
    """Not across grouped-query heads (as the reference), and not where a router or experts read the same norm."""
    linear = all(isinstance(block.get_submodule(name), nn.Linear) for name in pair.consumers)
    return (
        pair.repeat == 1 and pair.expert is None and linear and not any(".experts." in name for name in pair.consumers)
    )


def _inspected(pair: ScalePair) -> str:
    """The module whose output a candidate is judged by, "" for the whole block."""
    if pair.producer_kind == "linear":
        return pair.consumers[0]
    modules = zip(*(name.split(".")[:-1] for name in pair.consumers), strict=False)
    return ".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, modules))


class _Probe:
    """The inspected module with its recorded float inputs and outputs on a few calibration samples."""

    def __init__(
        self, call: BlockCall, source: Activations, inspected: str, pair: ScalePair, samples: int, pool: Workers
    ) -> None:
        self._block, self._pair, self._pool = call.block, pair, pool
        self._module = call.block.get_submodule(inspected) if inspected else call.block
        self._calls = [self._record(call, source.read(sample)) for sample in range(samples)]
        self._outputs = pool.map(lambda inputs: _run(self._module, inputs), self._calls)

    def _record(self, call: BlockCall, hidden: Tensor) -> tuple[Any, Any]:
        seen: list[tuple[Any, Any]] = []
        hook = self._module.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
        )
        try:
            call.run(hidden)
        finally:
            hook.remove()
        return seen[0]

    def loss(self, replacements: Sequence[Tensor]) -> float:
        """Mean squared change of the output with these weights in place of the consumers'."""
        weights = [_weight(self._block, name) for name in self._pair.consumers]
        saved = [weight.clone() for weight in weights]
        try:
            for weight, new in zip(weights, replacements, strict=True):
                weight.copy_(new)
            pairs = list(zip(self._calls, self._outputs, strict=True))
            losses = self._pool.map(lambda pair: float((_run(self._module, pair[0]) - pair[1]).square().mean()), pairs)
        finally:
            for weight, old in zip(weights, saved, strict=True):
                weight.copy_(old)
        return sum(losses) / len(losses)


def _run(module: nn.Module, inputs: tuple[Any, Any]) -> Tensor:
    out = module(*inputs[0], **inputs[1])
    return out if isinstance(out, Tensor) else out[0]


def _weight(block: nn.Module, name: str) -> Tensor:
    weight = block.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight
