"""SmoothQuant (Xiao et al., arXiv 2211.10438): move the reach of activations into weights, channel by channel.

With A_j = max |x_j| over calibration and B_j = max over readers and rows |W[n, j]|: s_j = A_j^alpha / B_j^beta, beta = 1 - alpha;
what writes channel j is divided by s_j, columns j of what reads it are multiplied. Then A'_j = (A_j B_j)^(1 - alpha) and
B'_j = (A_j B_j)^alpha. The paper smooths what norms write; `linears` adds pairs (values -> output, up -> down) by the name of
the reader, as QoQ does for the down projection with a small alpha. Across grouped-query heads A and B are the largest of the
repeats. alpha "search" takes, pair by pair, the alpha in 0, 1/20 .. 1 (or no scaling) with the least squared change of the
block's output when the pair's readers have weights rounded by `weights` and inputs by `activations`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from anybit.calibration.activations import Activations
from anybit.calibration.parallel import Workers
from anybit.calibration.statistics import BlockCall, collect
from anybit.formats.terms import dense
from anybit.methods.activations import IntInputs
from anybit.methods.base import InputStats
from anybit.methods.rtn import RTN
from anybit.models.graph import BlockGraph
from anybit.models.pairs import ScalePair, apply_scale, scale_pairs
from anybit.transforms.base import Transform

SMALLEST = 1e-5
GRID = 20
NORM = "norm"


class Smooth(Transform):
    """Options: `alpha`, `beta` (default 1 - alpha), `linears` ("norm": whatever a norm feeds; else patterns on full names of
    readers), and for the search the quantizers and the number of calibration samples it runs on."""

    name: ClassVar[str] = "smooth"
    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["search"] = 0.5
    beta: float | None = Field(default=None, ge=0, le=1)
    linears: tuple[str, ...] = (NORM,)
    weights: RTN = RTN(bits=8, group_size=-1, symmetric=True)
    activations: IntInputs = IntInputs()
    samples: int = Field(default=4, ge=1)

    def apply(self, call: BlockCall, graph: BlockGraph, source: Activations, pool: Workers) -> list[str]:
        """Rescale the block; one note per smoothed reader."""
        notes = []
        for pair, reach in reaches(call, graph, source, self.linears, pool):
            spans = largest_weights(call.block, pair)
            alpha = self._search(call, source, pair, (reach, spans), pool) if self.alpha == "search" else self.alpha
            if alpha is None:
                continue
            s = self.scales(reach, spans, alpha)
            apply_scale(call.block, pair, s)
            words = f"smoothed with alpha {alpha:.2f}, {float(s.min()):.3g} to {float(s.max()):.3g}"
            notes += [f"{name}: {words}" for name in pair.consumers]
        return notes

    def scales(self, reach: Tensor, spans: Tensor, alpha: float) -> Tensor:
        """s float32 [K] from A = `reach` and B = `spans` [K]: 1 where A is 0, and 1 everywhere where a number overflows."""
        beta = 1 - alpha if self.beta is None else self.beta
        s = (reach.pow(alpha) / spans.clamp_min(SMALLEST).pow(beta)).clamp_min(SMALLEST)
        s = torch.where(reach == 0, 1.0, s)
        return s if bool(torch.isfinite(s).all()) else torch.ones_like(s)

    def _search(
        self, call: BlockCall, source: Activations, pair: ScalePair, maxima: tuple[Tensor, Tensor], pool: Workers
    ) -> float | None:
        """The alpha with the least loss; None: not scaling is best."""
        block, probe = call.block, BlockCall(call.block, call.arguments, call.in_flight)
        samples = range(min(self.samples, source.samples))
        expected = pool.map(lambda i: call.run(source.read(i)), samples)
        parameters = [p for name in (pair.producer, *pair.consumers) for p in block.get_submodule(name).parameters()]
        saved = [parameter.clone() for parameter in parameters]
        linears = [name for name in pair.consumers if isinstance(block.get_submodule(name), nn.Linear)]
        spec, best, least = self.activations.spec(), None, float("inf")

        def read(x: Tensor) -> Tensor:
            return spec.encode(x.reshape(-1, x.shape[-1]), {}).values().view(x.shape)

        for name in linears:
            probe.attach(name, read)
        for alpha in [None, *(i / GRID for i in range(GRID + 1))]:
            if alpha is not None:
                apply_scale(block, pair, self.scales(*maxima, alpha))
            for name in linears:
                weight = block.get_parameter(f"{name}.weight")
                weight.copy_(dense(self.weights.quantize(weight, InputStats())))
            loss = sum(pool.map(lambda i: float((probe.run(source.read(i)) - expected[i]).square().sum()), samples))
            if loss < least:
                best, least = alpha, loss
            for parameter, value in zip(parameters, saved, strict=True):
                parameter.copy_(value)
        probe.detach()
        return best


def reaches(
    call: BlockCall, graph: BlockGraph, source: Activations, linears: Sequence[str], pool: Workers
) -> Iterator[tuple[ScalePair, Tensor]]:
    """The pairs of the block that `linears` names (`NORM`, or patterns on full names of readers), each with the largest |x| of
    its channels before any of them is rescaled, float32 [pair.size]; without those no token came to."""

    def chosen(pair: ScalePair) -> bool:
        if NORM in linears and pair.producer_kind != "linear":
            return True
        names = [call.full_name(name) for name in pair.consumers]
        return any(fnmatch.filter(names, pattern) for pattern in linears)

    pairs = list(filter(chosen, scale_pairs(call.block, source.read(0), call.arguments, graph)))
    firsts = [g.linears[0] for g in graph.groups if any(g.linears[0] in p.consumers for p in pairs)]
    statistics = collect(call, source, firsts, frozenset({"max_abs"}), pool) if pairs else {}
    for pair in pairs:
        if (reach := reach_of(pair, statistics)) is not None:
            yield pair, reach


def reach_of(pair: ScalePair, statistics: dict[str, InputStats]) -> Tensor | None:
    """A float32 [pair.size]: the largest |x| of each channel over all inputs `pair` has; None where no token came."""
    found = [statistics[name].max_abs for name in pair.consumers if name in statistics]
    reached = [maxima for maxima in found if maxima is not None]
    return per_scale(pair, torch.stack(reached).amax(0)) if reached else None


def largest_weights(block: nn.Module, pair: ScalePair) -> Tensor:
    """B float32 [pair.size]: the largest |W| of each channel over all readers."""
    return per_scale(pair, torch.stack(list(_columns(block, pair))).amax(0))


def per_scale(pair: ScalePair, columns: Tensor) -> Tensor:
    """The largest of the repeats of each channel: [pair.size * repeat] -> [pair.size]."""
    return columns.view(-1, pair.repeat, pair.run).amax(1).reshape(-1)


def _columns(block: nn.Module, pair: ScalePair) -> Iterator[Tensor]:
    for name in pair.consumers:
        yield block.get_parameter(f"{name}.weight").abs().amax(0)
