"""Fitting an affine grid to weights: min-max, or a search over shrunken ranges.

`mse` is GPTQ's own search (methods/gptq.md step 7). `hessian` is ours: the same idea with the error of column k weighted by
H_kk, so that what counts is what the input makes of it, at a third of the candidates and without the costly power 2.4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from anybit.formats.affine import Affine, group_range
from anybit.formats.decoder import Form, by_group
from anybit.methods.base import Method

SHRINKS = {"none": [], "mse": [1 - i / 100 for i in range(1, 80)], "hessian": [1 - i / 50 for i in range(1, 31)]}
MSE_NORM = 2.4
BLOCK_WEIGHTS = 1 << 16


class Grouped(Method):
    """A method with groups of `group_size` columns; -1: one group a row."""

    group_size: int = Field(default=32, ge=-1)

    @field_validator("group_size")
    @classmethod
    def _not_zero(cls, value: int) -> int:
        if value == 0:
            raise ValueError("must be at least 1, or -1 for one group a row")
        return value

    def columns_per_group(self, columns: int) -> int:
        """The group size for rows of `columns`; the last group of a row is shorter when it does not divide them."""
        return columns if self.group_size == -1 else min(self.group_size, columns)


class AffineGrid(Grouped):
    """How an affine grid is fitted: the options and form that RTN, GPTQ and AWQ share.

    `group_size` -1 means one group a row. `clip` other than "none" keeps, per group, the shrink of the range with the least
    error: "mse" sum |q(w) - w|^2.4, "hessian" sum H_kk (q(w) - w)^2. At 2 asymmetric bits both integer neighbours of the
    zero point are tried as well.

    `balanced` gives 2 bits a fifth level, {-2..2} where the range is symmetric (ABQ-LLM's bit balance, W2*); its codes 0..4 take
    three planes.
    """

    balances: ClassVar[bool] = False
    bits: int = Field(default=4, ge=2, le=8)
    symmetric: bool = False
    clip: Literal["none", "mse", "hessian"] = "none"
    balanced: bool = False

    @property
    def stored_bits(self) -> int:
        """Planes of the codes."""
        return 3 if self.balanced else self.bits

    @property
    def steps(self) -> int:
        """The largest code."""
        return 2**self.bits if self.balanced else 2**self.bits - 1

    @model_validator(mode="after")
    def _balance_fits(self) -> Self:
        if self.balanced and not self.balances:
            raise ValueError(f"'{self.name}' has no balanced grid; rtn and gptq have")
        if self.balanced and (self.bits != 2 or self.symmetric or self.clip != "none"):
            raise ValueError("balanced is for bits=2, symmetric=false (the zero point is stored), clip=none")
        return self

    def plan(self, shape: tuple[int, int]) -> Form:
        """One affine code term over all columns."""
        part = {"kind": "affine", "bits": self.stored_bits, "group_size": self.columns_per_group(shape[1])}
        return {
            "shape": list(shape),
            "terms": [{"term": "code", "columns": [0, shape[1]], **part, "symmetric": self.symmetric}],
        }

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Affine:
        """The grid for weight float32 [N, K]; `importance` float32 [K] is diag H for clip "hessian" (None: all equal)."""
        group_size = self.columns_per_group(weight.shape[1])
        low, high = group_range(weight, group_size)
        grid = Affine.from_range(low, high, self.stored_bits, group_size, self.symmetric, self.steps)
        if self.clip == "none":
            return grid
        parts = [self._search(rows, grid.rows(i, i + len(rows)), importance) for i, rows in _row_blocks(weight)]
        zero = None if grid.zero is None else torch.cat([part.zero for part in parts if part.zero is not None])
        return Affine(self.bits, group_size, torch.cat([part.scale for part in parts]), zero)

    def _search(self, weight: Tensor, best: Affine, importance: Tensor | None) -> Affine:
        low, high = group_range(weight, best.group_size)
        scale, zero = best.scale, best.zero
        least = self._loss(best, weight, importance)
        for shrink in SHRINKS[self.clip]:
            for candidate in self._candidates(low * shrink, high * shrink, best.group_size):
                loss = self._loss(candidate, weight, importance)
                better = loss < least
                least = torch.where(better, loss, least)
                scale = torch.where(better, candidate.scale, scale)
                if zero is not None and candidate.zero is not None:
                    zero = torch.where(better, candidate.zero, zero)
        return Affine(self.bits, best.group_size, scale, zero)

    def _loss(self, grid: Affine, weight: Tensor, importance: Tensor | None) -> Tensor:
        """The error `clip` minimises, per group [N, G]."""
        lost = grid.decode(grid.encode(weight)) - weight
        lost = lost.abs().pow(MSE_NORM) if self.clip == "mse" else lost.square()
        if self.clip == "hessian" and importance is not None:
            lost = lost * importance
        return by_group(lost, grid.group_size).sum(-1)

    def _candidates(self, low: Tensor, high: Tensor, group_size: int) -> list[Affine]:
        grid = Affine.from_range(low, high, self.bits, group_size, self.symmetric)
        if self.bits > 2 or grid.zero is None:
            return [grid]
        ideal = -low / grid.scale.float()
        sides = [side.clamp(0, 3).to(torch.uint8) for side in (ideal.floor(), ideal.ceil())]
        return [Affine(self.bits, group_size, grid.scale, side) for side in sides]


def _row_blocks(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Rows a few at a time, so that a search goes over data that stays in the cache."""
    step = max(1, BLOCK_WEIGHTS // weight.shape[1])
    return ((i, weight[i : i + step]) for i in range(0, len(weight), step))
