"""Round to nearest: every weight to the nearest point of a grid fitted to its group. The baseline of every paper.

code = clip(round(w / s) + z, 0, 2^b - 1), value = s (code - z); grids as in `methods/grid.py`. Needs no calibration.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from anybit.formats.terms import CodeTerm, Term
from anybit.methods.base import InputStats
from anybit.methods.grid import AffineGrid


class RTN(AffineGrid):
    """Options: `bits` 2..8, `group_size` (-1 = whole row), `symmetric`, `clip` (none, mse)."""

    name: ClassVar[str] = "rtn"
    balances: ClassVar[bool] = True

    def quantize(self, weight: Tensor, stats: InputStats) -> list[Term]:
        """One affine code term."""
        grid = self.fit(weight, None if stats.hessian is None else stats.hessian.diagonal())
        return [CodeTerm.from_codes(grid.encode(weight).clamp_max(self.steps), grid)]
