"""Round to nearest: every weight to the nearest point of a grid fitted to its group. The baseline of every paper.

code = clip(round(w / s) + z, 0, 2^b - 1), value = s (code - z); grids as in `methods/grid.py`. Needs no calibration.
`SymmetricRTN` is the other symmetric convention: max|w| falls on the code 2^(b-1) - 1, as FlexQ and Tender have it, where the
grids of `methods/grid.py` span 2^b - 1 steps and cut the positive end half a step short.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from anybit.formats.affine import Affine, group_reach
from anybit.formats.decoder import Form, to_scale
from anybit.formats.terms import CodeTerm, Term
from anybit.methods.base import InputStats
from anybit.methods.grid import AffineGrid, Grouped


class RTN(AffineGrid):
    """Options: `bits` 2..8, `group_size` (-1 = whole row), `symmetric`, `clip` (none, mse)."""

    name: ClassVar[str] = "rtn"
    balances: ClassVar[bool] = True

    def quantize(self, weight: Tensor, stats: InputStats) -> list[Term]:
        """One affine code term."""
        grid = self.fit(weight, None if stats.hessian is None else stats.hessian.diagonal())
        return [CodeTerm.from_codes(grid.encode(weight).clamp_max(self.steps), grid)]


class SymmetricRTN(Grouped):
    """Options: `bits` 2..8, `group_size` (-1 = whole row). scale = max|w| / (2^(bits-1) - 1)."""

    name: ClassVar[str] = "rtn-symmetric"
    bits: int = Field(default=8, ge=2, le=8)
    group_size: int = Field(default=-1, ge=-1)

    def plan(self, shape: tuple[int, int]) -> Form:
        """One symmetric affine code term over all columns."""
        part = {"kind": "affine", "bits": self.bits, "group_size": self.columns_per_group(shape[1]), "symmetric": True}
        return {"shape": list(shape), "terms": [{"term": "code", "columns": [0, shape[1]], **part}]}

    def quantize(self, weight: Tensor, stats: InputStats) -> list[Term]:
        """One symmetric affine code term."""
        size = self.columns_per_group(weight.shape[1])
        grid = Affine(self.bits, size, to_scale(group_reach(weight, size) / (2 ** (self.bits - 1) - 1)), None)
        return [CodeTerm.from_codes(grid.encode(weight), grid)]
