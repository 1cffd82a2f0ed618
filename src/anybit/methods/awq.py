"""AWQ (Lin et al., arXiv 2306.00978): scale salient input channels up before rounding, then clip ranges; both by
search.

AWQScale (a block transform). For a producer and the linears W_i reading its output x: with a_j = mean |x_j|, try r =
0, 1/20 ..
19/20, s = max(a^r, 1e-4) / sqrt(max s * min s), measure the mean squared change of the *inspected module's* output
when every
W_i is replaced by Q(W_i s) / s, keep the best r, then divide the producer by s and multiply the columns by s: float
output unchanged, s free at run time. Inspected: the smallest module around all readers of a norm (attention,
feed-forward); otherwise the linear itself. Pairs across grouped-query heads are skipped, as in the reference code.
Reduced: the search measures on `samples` calibration sequences, not on all of them.

AWQ (the weight quantizer). Per row and group, shrink the range to (1 - i/20) max|w|, i = 0..9, and keep the i with
the least squared error of the group's partial outputs on up to 512 sampled tokens; query and key projections are not
clipped, since their outputs meet in a product. Then round to nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from anybit.formats.affine import group_range
from anybit.formats.decoder import by_group, per_column
from anybit.formats.terms import CodeTerm, Term
from anybit.methods.base import InputStats
from anybit.methods.grid import AffineGrid

RATIOS = 20
CLIP_STEPS = 10
CLIP_GRID = 20
UNCLIPPED = ("q_proj", "k_proj", "query", "key", "qkv", "c_attn")


class AWQ(AffineGrid):
    """Options: those of the grid; `search_clip` switches the clip search off (then this is RTN)."""

    name: ClassVar[str] = "awq"
    needs: ClassVar[frozenset[str]] = frozenset({"inputs"})
    rowwise: ClassVar[bool] = False  # which rows are clipped depends on the layer's name
    search_clip: bool = True

    def quantize(self, weight: Tensor, stats: InputStats) -> list[Term]:
        """One affine code term."""
        if self.search_clip and not any(word in stats.name for word in UNCLIPPED):
            weight = self.clipped(weight, stats)
        grid = self.fit(weight)
        return [CodeTerm.from_codes(grid.encode(weight), grid)]

    def clipped(self, weight: Tensor, stats: InputStats) -> Tensor:
        """weight [N, K] clamped per row and group to the range found best on the sampled inputs."""
        assert stats.inputs is not None
        size = self.columns_per_group(weight.shape[1])
        low, high = group_range(weight, size)
        reach = torch.maximum(-low, high)
        gram = _group_gram(stats.inputs, size)
        best, least = weight, torch.full_like(reach, torch.inf)
        for i in range(CLIP_STEPS):
            limit = per_column(reach * (1 - i / CLIP_GRID), weight.shape[1], size)
            clamped = torch.minimum(torch.maximum(weight, -limit), limit)
            grid = self.fit(clamped)
            loss = _partial_output_loss(grid.decode(grid.encode(clamped)) - weight, gram, size)
            better = loss < least
            least = torch.where(better, loss, least)
            best = torch.where(per_column(better, weight.shape[1], size), clamped, best)
        return best


class AWQScale(AffineGrid):
    """Options: those of the grid the scales are chosen for, and `samples`, the calibration sequences the search runs
    on."""

    name: ClassVar[str] = "awq-scale"
    samples: int = Field(default=8, ge=1)

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


def _group_gram(inputs: Tensor, size: int) -> Tensor:
    """X_g^T X_g of each group of columns of inputs [S, K]: [G, size, size], zero-padded."""
    grouped = by_group(inputs, size).transpose(0, 1)
    return grouped.transpose(1, 2) @ grouped


def _partial_output_loss(delta: Tensor, gram: Tensor, size: int) -> Tensor:
    """sum over tokens of (x_g . delta_g)^2 for each row and group: delta [N, K] -> [N, G]."""
    grouped = by_group(delta, size).transpose(0, 1)
    return ((grouped @ gram) * grouped).sum(-1).t()
