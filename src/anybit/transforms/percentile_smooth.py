"""Percentile smoothing (DGQ, arXiv 2310.04836): flatten only the few channels of largest reach, into the weights that read them.

a_c = max |x_c| over calibration, t = the m-th largest of them, m = int(share * C + 1.5). s_c = a_c / t for the m - 1
channels above t, 1 for all others: those channels end exactly at t, nothing else moves, no weight is looked at. What a norm
writes is smoothed, and what `linears` names (the input of the down projection, through the rows of up). `cap` (the paper's
code has such a limit, off) bounds how far a channel's weights may grow past the largest of all others, since a column
far above its group takes the group's whole range.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from anybit.calibration.activations import Activations
from anybit.calibration.parallel import Workers
from anybit.calibration.statistics import BlockCall
from anybit.models.graph import BlockGraph
from anybit.models.pairs import apply_scale
from anybit.transforms.base import Transform
from anybit.transforms.hadamard import DOWN
from anybit.transforms.smooth import NORM, largest_weights, reaches

DEAD = 1e-4


class PercentileSmooth(Transform):
    """Options: `share` of channels to flatten, `linears` as in `smooth`, `cap` (None: no limit)."""

    name: ClassVar[str] = "percentile-smooth"
    share: float = Field(default=0.005, gt=0, lt=1)
    linears: tuple[str, ...] = (NORM, *DOWN)
    cap: float | None = Field(default=None, gt=0)

    def apply(self, call: BlockCall, graph: BlockGraph, source: Activations, pool: Workers) -> list[str]:
        """Rescale the block; one note per smoothed reader."""
        notes = []
        for pair, reach in reaches(call, graph, source, self.linears, pool):
            s = self.scales(reach, largest_weights(call.block, pair))
            if bool((s == 1).all()):
                continue
            apply_scale(call.block, pair, s)
            words = f"{int((s > 1).sum())} of {len(s)} channels flattened, by up to {float(s.max()):.3g}"
            notes += [f"{name}: {words}" for name in pair.consumers]
        return notes

    def scales(self, reach: Tensor, spans: Tensor) -> Tensor:
        """s float32 [C] from a = `reach` and max |W| of each column = `spans` [C]; all 1 where the m-th largest reach is next to
        nothing, or a number is not finite."""
        m = int(self.share * len(reach) + 1.5)
        top = reach.topk(m).values[-1]
        if not bool(reach.isfinite().all()) or float(top) < DEAD:
            return torch.ones_like(reach)
        s = (reach / top).clamp_min(1)
        if self.cap is not None:
            s = torch.minimum(s, (self.cap * spans[s == 1].max() / spans.clamp_min(1e-12)).clamp_min(1))
        return s
