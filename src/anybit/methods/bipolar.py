"""Bipolar integers (arXiv 2409.17870): weights on the odd numbers, optionally with activations on the odd numbers as well.

scale = shrink * max|w| / (2^b - 1), code the nearest odd number; the shrink with the least squared error of 0.2, 0.22, ..., 1
is kept per group (`search: mse`). One bit: scale = mean|w|, the best for signs. Integers convert exactly: `of_affine`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from anybit.formats.affine import Affine, group_reach
from anybit.formats.bipolar import Bipolar
from anybit.formats.bipolar_activations import BipolarActivations
from anybit.formats.decoder import Form, by_group, to_scale
from anybit.formats.terms import CodeTerm, Term
from anybit.methods.activations import ActivationMethod
from anybit.methods.base import InputStats, Method

SHRINKS = [0.2 + 0.02 * i for i in range(41)]


class BipolarRTN(Method):
    """Options: `bits` 1..8, `group_size` (-1 = whole row), `search` (mse, none)."""

    name: ClassVar[str] = "bipolar"
    bits: int = Field(default=4, ge=1, le=8)
    group_size: int = Field(default=128, ge=-1)
    search: Literal["mse", "none"] = "mse"

    def plan(self, shape: tuple[int, int]) -> Form:
        """One bipolar code term over all columns."""
        part = {"kind": "bipolar", "bits": self.bits, "group_size": self.columns_per_group(shape[1])}
        return {"shape": list(shape), "terms": [{"term": "code", "columns": [0, shape[1]], **part}]}

    def columns_per_group(self, columns: int) -> int:
        """The group size for rows of `columns`."""
        return min(self.group_size, columns) if self.group_size > 0 else columns

    def quantize(self, weight: Tensor, stats: InputStats) -> list[Term]:
        """One bipolar code term."""
        grid = self.fit(weight)
        return [CodeTerm.from_codes(grid.encode(weight), grid)]

    def fit(self, weight: Tensor) -> Bipolar:
        """The grid for weight float32 [N, K]."""
        size = self.columns_per_group(weight.shape[1])
        if self.bits == 1:
            counts = by_group(torch.ones_like(weight[:1]), size).sum(-1)
            mean = by_group(weight.abs(), size).sum(-1) / counts
            return Bipolar(1, size, to_scale(torch.where(mean > 0, mean, 1.0)))
        reach = group_reach(weight, size)
        trials = SHRINKS if self.search == "mse" else [1.0]
        grids = [Bipolar(self.bits, size, to_scale(reach * shrink / (2**self.bits - 1))) for shrink in trials]
        best, least = grids[0].scale, _lost(grids[0], weight)
        for grid in grids[1:]:
            lost = _lost(grid, weight)
            best, least = torch.where(lost < least, grid.scale, best), torch.minimum(lost, least)
        return Bipolar(self.bits, size, best)


class BipolarInputs(ActivationMethod):
    """Options as `formats/bipolar_activations.py: BipolarActivations`."""

    name: ClassVar[str] = "bipolar"
    bits: int = Field(default=4, ge=1, le=7)
    granularity: Literal["token", "group"] = "token"
    group_size: int = Field(default=128, ge=32)
    clip: float = Field(default=1.0, gt=0, le=1)

    def spec(self) -> BipolarActivations:
        """The scheme."""
        return BipolarActivations(self.bits, self.granularity, self.group_size, self.clip)


def of_affine(grid: Affine) -> tuple[Bipolar, Tensor]:
    """Bipolar grid and offset float32 [N, G] such that scale (code - zero) = bipolar.decode(code) + offset for the same codes.

    s (u - z) = s/2 (2u - (2^b - 1)) + s ((2^b - 1) / 2 - z). Exact unless s/2 leaves float16's normal numbers.
    """
    zero = 2.0 ** (grid.bits - 1) if grid.zero is None else grid.zero.float()
    offset = grid.scale.float() * ((2**grid.bits - 1) / 2 - zero)
    return Bipolar(grid.bits, grid.group_size, (grid.scale.float() / 2).half()), offset


def _lost(grid: Bipolar, weight: Tensor) -> Tensor:
    """Squared error of each group [N, G]."""
    return by_group((grid.decode(grid.encode(weight)) - weight).square(), grid.group_size).sum(-1)
