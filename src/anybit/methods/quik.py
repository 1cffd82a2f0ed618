"""QUIK (Ashkboos et al., arXiv 2310.09259): 4- or 8-bit weights for quantized activations, a few input columns in float16.

weight [N, K], H = 2/T X^T X [K, K], a_k = max |x_k| over calibration. The `count` columns with the largest a_k are outliers:
they bypass the quantizer of activations (`formats/activation.py`) and keep float16 weights. Steps: fit one symmetric grid a
row to the other columns; order them, outliers last; walk as GPTQ does (`column_solver.py`). Outlier columns are never rounded
to the grid but receive the error of all the others, so what is stored is *updated*: they absorb what rounding does to the
rest. Codes cover all K columns, those of outliers decode to exactly 0: nothing is permuted or gathered at run time.

outliers, fraction   count = min(K, max(outliers, int(K * fraction))); the paper has 256 of 4096, and in proportion for the down
                     projection.
threshold            a layer where no a_k is above it keeps no outliers (the paper's T; 2 T is its choice for 8-bit layers).
order                of the columns that are rounded: "reach" = ascending a_k (the paper), "activation" = descending diag H,
                     "natural".
sparsity "2:4"       SparseGPT's joint loop: at least two of four aligned columns are 0, chosen row by row by w^2 / U_kk^2 when
                     the walk reaches them (so the order is natural). Outlier columns stay dense and count as zeros of their
                     four, for that is what their codes are: the mask is of the codes as stored, no permutation to undo.

The grid is `Affine`'s symmetric one, scale 2 max|w| / (2^b - 1) before the `clip` search; the paper's is max|w| / (2^(b-1) - 1).
Damping, block and `first_token_weight` as in `methods/gptq.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from anybit.errors import CalibrationError
from anybit.formats.affine import Affine
from anybit.formats.decoder import Form
from anybit.formats.terms import CodeTerm, ColumnsTerm, Term
from anybit.methods.base import InputStats
from anybit.methods.column_solver import factor, prepare, solve
from anybit.methods.gptq import block_stops
from anybit.methods.grid import AffineGrid


class QUIK(AffineGrid):
    """Options: those of the grid (one symmetric group a row by default), and those explained above."""

    name: ClassVar[str] = "quik"
    needs: ClassVar[frozenset[str]] = frozenset({"hessian", "max_abs"})
    group_size: int = Field(default=-1, ge=-1)
    symmetric: Literal[True] = True
    outliers: int = Field(default=256, ge=0)
    fraction: float = Field(default=0.0, ge=0, le=1)
    threshold: float = Field(default=0.0, ge=0)
    order: Literal["reach", "activation", "natural"] = "reach"
    sparsity: Literal["none", "2:4"] = "none"
    damping: float = Field(default=0.01, gt=0, lt=1)
    block: int = Field(default=128, ge=1)
    first_token_weight: float = Field(default=1.0, ge=1)

    def count(self, columns: int) -> int:
        """Outliers of a layer with so many columns."""
        return min(columns, max(self.outliers, int(columns * self.fraction)))

    def plan(self, shape: tuple[int, int]) -> Form:
        """One affine code term over all columns, and the outlier columns."""
        form, count = super().plan(shape), self.count(shape[1])
        if self.sparsity != "none":
            form["terms"][0]["sparsity"] = self.sparsity
        if count:
            form["terms"].append({"term": "columns", "count": count})
        return form

    def settle(self, shape: tuple[int, int], stats: InputStats) -> Form:
        """The plan without the outlier columns where `threshold` says that the layer has none."""
        return self.within(stats).plan(shape)

    def within(self, stats: InputStats) -> QUIK:
        """This method for a layer with such inputs: without outliers if none reaches beyond `threshold`."""
        calm = stats.max_abs is not None and bool(stats.max_abs.max() <= self.threshold)
        return self.model_copy(update={"outliers": 0, "fraction": 0.0}) if calm else self

    def quantize(self, weight: Tensor, stats: InputStats) -> list[Term]:
        """Codes, and the outlier columns as the walk left them."""
        solved = self.within(stats).solve(weight, stats)
        codes = CodeTerm.from_codes(solved.codes, solved.grid, "" if self.sparsity == "none" else self.sparsity)
        if not len(solved.index):
            return [codes]
        return [codes, ColumnsTerm(solved.index.int(), solved.kept, codes.shape)]

    def solve(self, weight: Tensor, stats: InputStats) -> Solved:
        """The walk for weight float32 [N, K].

        Raises:
            CalibrationError: the statistics cannot be factored.
        """
        if stats.hessian is None or stats.max_abs is None:
            raise CalibrationError(f"{stats.name}: QUIK needs the Hessian and the reach of the inputs; calibrate it")
        weight, hessian = prepare(weight, stats.hessian)
        order, count = self.columns(stats.max_abs, hessian.diagonal()), self.count(weight.shape[1])
        index = order[len(order) - count :].sort().values
        grid = self.fit(weight.index_fill(1, index, 0.0), hessian.diagonal())
        upper, damping = factor(hessian[order][:, order], self.damping)
        walk = _Walk(grid, order, len(order) - count, upper if self.sparsity == "2:4" else None)
        codes, losses = solve(weight[:, order], upper, walk.quantize, block_stops(walk.fours, self.block, True))
        natural = torch.empty_like(codes)
        natural[:, order] = codes
        kept = torch.stack(walk.kept, 1) if count else weight[:, :0].half()
        return Solved(natural, grid, index, kept, float(losses.sum()), damping)

    def columns(self, reach: Tensor, energy: Tensor) -> Tensor:
        """int64 [K]: columns in the order of the walk, the outliers last, ascending; `reach` is a_k and `energy` diag H, [K]."""
        ascending = reach.argsort(stable=True)
        base = len(ascending) - self.count(len(ascending))
        first, last = ascending[:base], ascending[base:].sort().values
        if self.sparsity != "none" or self.order == "natural":
            first = first.sort().values
        elif self.order == "activation":
            first = first[energy[first].argsort(descending=True, stable=True)]
        return torch.cat([first, last])


@dataclass(frozen=True)
class Solved:
    """What the walk found.

    Attributes:
        codes: uint8 [N, K] in natural order.
        grid: what they refer to.
        index: int64 [n], the outlier columns, ascending.
        kept: float16 [N, n], their updated weights.
        loss: 1/2 tr((W - Q) H (W - Q)^T) with the damped H.
        damping: relative, as needed.
    """

    codes: Tensor
    grid: Affine
    index: Tensor
    kept: Tensor
    loss: float
    damping: float


class _Walk:
    """The quantizer of columns in solver order: `base` of them on the grid, the rest to float16."""

    def __init__(self, grid: Affine, order: Tensor, base: int, upper: Tensor | None) -> None:
        """`upper` is given where two of four columns must be 0."""
        self._scale = grid.scale.float().t().contiguous()
        self._group, self._base = (order // grid.group_size).tolist(), base
        self._zero, self._top = 2.0 ** (grid.bits - 1), 2.0**grid.bits - 1
        self._upper, self._pruned = upper, torch.empty(0)
        self.fours: list[int] = (order // 4).tolist() if upper is not None else list(range(len(order)))
        self.kept: list[Tensor] = []

    def quantize(self, rest: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """A `column_solver.Quantizer`."""
        if i >= self._base:
            self.kept.append(rest[i].half())
            return torch.full_like(rest[i], self._zero, dtype=torch.uint8), self.kept[-1].float()
        w, scale = rest[i], self._scale[self._group[i]]
        if self._upper is not None:
            w = w.masked_fill(self._prune(self._upper, rest, i), 0.0)
        codes = (w / scale).round_().add_(self._zero).clamp_(0, self._top)
        return codes.to(torch.uint8), (codes - self._zero) * scale

    def _prune(self, upper: Tensor, rest: Tensor, i: int) -> Tensor:
        """bool [N]: the rows in which column i is 0, decided for its four when the walk enters them."""
        start = i
        while start > 0 and self.fours[start - 1] == self.fours[i]:
            start -= 1
        if start == i:
            stop = next((j for j in range(i, self._base) if self.fours[j] != self.fours[i]), self._base)
            scores = rest[i:stop].square() / upper.diagonal()[i:stop, None].square()
            # Of the four, those that are no base columns are 0 already: two of what remains may stay, however many that is.
            self._pruned = scores.argsort(dim=0, descending=True, stable=True).argsort(dim=0) >= 2
        return self._pruned[i - start]
