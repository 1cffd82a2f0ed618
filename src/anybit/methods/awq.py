"""AWQ (Lin et al., arXiv 2306.00978), the weight quantizer: clip ranges by search. Its scales are `transforms/awq_scale.py`.

Per row and group, shrink the range to (1 - i/20) max|w|, i = 0..9, and keep the i with
the least squared error of the group's partial outputs on up to 512 sampled tokens; query and key projections are not
clipped, since their outputs meet in a product. Then round to nearest.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from anybit.formats.affine import group_range
from anybit.formats.decoder import by_group, per_column
from anybit.formats.terms import CodeTerm, Term
from anybit.methods.base import InputStats
from anybit.methods.grid import AffineGrid

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


def _group_gram(inputs: Tensor, size: int) -> Tensor:
    """X_g^T X_g of each group of columns of inputs [S, K]: [G, size, size], zero-padded."""
    grouped = by_group(inputs, size).transpose(0, 1)
    return grouped.transpose(1, 2) @ grouped


def _partial_output_loss(delta: Tensor, gram: Tensor, size: int) -> Tensor:
    """sum over tokens of (x_g . delta_g)^2 for each row and group: delta [N, K] -> [N, G]."""
    grouped = by_group(delta, size).transpose(0, 1)
    return ((grouped @ gram) * grouped).sum(-1).t()
