"""Fitting an affine grid to weights: min-max, or the clip search of GPTQ's `mse` option (methods/gptq.md step 7)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from anybit.formats.affine import Affine, group_range
from anybit.formats.decoder import Form, groups
from anybit.methods.base import Method

CLIP_STEPS = 80  # candidates p = 1 - i/100, i = 0..79
CLIP_NORM = 2.4


class AffineGrid(Method):
    """How an affine grid is fitted: the options and form that RTN, GPTQ and AWQ share.

    `group_size` -1 means one group a row. `clip="mse"` keeps, per group, the shrink of the range with the least
    sum |q(w) - w|^2.4; at 2 asymmetric bits both integer neighbours of the zero point are tried as well.
    """

    bits: int = Field(default=4, ge=2, le=8)
    group_size: int = Field(default=32, ge=-1)
    symmetric: bool = False
    clip: Literal["none", "mse"] = "none"

    @field_validator("group_size")
    @classmethod
    def _not_zero(cls, value: int) -> int:
        if value == 0:
            raise ValueError("must be at least 1, or -1 for one group a row")
        return value

    def plan(self, shape: tuple[int, int]) -> Form:
        """One affine code term over all columns."""
        part = {"kind": "affine", "bits": self.bits, "group_size": self.columns_per_group(shape[1])}
        return {
            "shape": list(shape),
            "terms": [{"term": "code", "columns": [0, shape[1]], **part, "symmetric": self.symmetric}],
        }

    def columns_per_group(self, columns: int) -> int:
        """The group size for rows of `columns`; the last group of a row is shorter when it does not divide them."""
        return columns if self.group_size == -1 else min(self.group_size, columns)

    def fit(self, weight: Tensor) -> Affine:
        """The grid for weight float32 [N, K]."""
        group_size = self.columns_per_group(weight.shape[1])
        if self.clip == "none":
            return Affine.fit(weight, self.bits, group_size, self.symmetric)
        return self._search(weight, group_size)

    def _search(self, weight: Tensor, group_size: int) -> Affine:
        low, high = group_range(weight, group_size)
        best = Affine.from_range(low, high, self.bits, group_size, self.symmetric)
        scale, zero = best.scale, best.zero
        least = _group_loss(best, weight)
        for i in range(1, CLIP_STEPS):
            shrink = 1 - i / 100
            for candidate in self._candidates(low * shrink, high * shrink, group_size):
                loss = _group_loss(candidate, weight)
                better = loss < least
                least = torch.where(better, loss, least)
                scale = torch.where(better, candidate.scale, scale)
                if zero is not None and candidate.zero is not None:
                    zero = torch.where(better, candidate.zero, zero)
        return Affine(self.bits, group_size, scale, zero)

    def _candidates(self, low: Tensor, high: Tensor, group_size: int) -> list[Affine]:
        grid = Affine.from_range(low, high, self.bits, group_size, self.symmetric)
        if self.bits > 2 or grid.zero is None:
            return [grid]
        ideal = -low / grid.scale.float()
        sides = [side.clamp(0, 3).to(torch.uint8) for side in (ideal.floor(), ideal.ceil())]
        return [Affine(self.bits, group_size, grid.scale, side) for side in sides]


def _group_loss(grid: Affine, weight: Tensor) -> Tensor:
    """sum |q(w) - w|^2.4 per group, [N, G]."""
    columns = weight.shape[1]
    lost = (grid.decode(grid.encode(weight)) - weight).abs().pow(CLIP_NORM)
    count = groups(columns, grid.group_size)
    padded = torch.nn.functional.pad(lost, (0, count * grid.group_size - columns))
    return padded.view(weight.shape[0], count, grid.group_size).sum(-1)
