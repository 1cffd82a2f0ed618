"""Uniform nested weights: one 8-bit code whose top p bits are a good p-bit quantization, for every width p.

The published way is MatGPTQ (arXiv 2602.03537; methods/any_precision.md 2.5): GPTQ's column walk picks, for each column,
the code that minimises sum_p lambda_p (w - value_p(code))^2 and feeds the mean of the widths' residuals back. It rounds
and saturates its slices, so they are no prefixes; here they are (`formats/nested_affine.py`), else nothing could switch.
`feedback: mean, refit: 0` is that method on floor slices. Beyond it:

feedback "own"   every width keeps a running target of its own, which its own error updates: all widths walk as GPTQ
                 would, coupled by nothing but the choice of the code.
refit            rounds of: least squares for all scales and zeros of a row, width by width, for the codes as they are;
                 then one sweep of coordinate descent over the codes for the grids as they are (`nested_refit.py`). Both
                 lower sum_p lambda_p 4^p tr(E_p H E_p^T), E_p = W - W_p, the first width by width.

Weights: lambda_p counts relative to how small errors at p bits can be (a factor 4 a bit), so equal ones ask every width for
the same factor above its optimum, and 8 bits, which have errors to spare, get a small one. (The published equal weights on
the squares themselves are 4^-p here.)
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from anybit.formats.affine import Affine
from anybit.formats.decoder import Form, by_group
from anybit.formats.form import RATIO_ONE
from anybit.formats.nested_affine import NestedAffine
from anybit.formats.terms import CodeTerm, Term
from anybit.methods.base import InputStats
from anybit.methods.column_solver import factor, prepare, solve
from anybit.methods.gptq import block_stops, column_order
from anybit.methods.grid import AffineGrid
from anybit.methods.nested_choice import Levels
from anybit.methods.nested_refit import descend, refit


class Nested(AffineGrid):
    """Options: those of the grid (`clip` searches one range for all widths), and those explained above.

    `bits` is the stored width; `precisions` the readable ones, `tables` those of them with a grid of their own (the others
    read the next wider one); `weights` lambda by width (a width without one is not looked after); `stream` the width whose
    values feed the layers and blocks calibrated next (None: all bits); `damping`, `block`, `first_token_weight` as for GPTQ.
    """

    name: ClassVar[str] = "nested"
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    rows_at_once: ClassVar[int | None] = 512
    bits: int = Field(default=8, ge=2, le=8)
    symmetric: Literal[False] = False
    precisions: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    tables: tuple[int, ...] = (2, 3, 4, 8)
    weights: dict[int, float] = Field(default={2: 0.5, 3: 1, 4: 0.2, 5: 0.5, 6: 0.1, 8: 0.01})
    feedback: Literal["own", "mean"] = "own"
    order: Literal["natural", "activation", "group"] = "activation"
    refit: int = Field(default=1, ge=0)
    stream: int | None = None
    damping: float = Field(default=0.01, gt=0, lt=1)
    block: int = Field(default=128, ge=1)
    first_token_weight: float = Field(default=1.0, ge=1)

    @model_validator(mode="after")
    def _widths_fit(self) -> Self:
        for what, widths in (("precisions", self.precisions), ("tables", self.tables)):
            if list(widths) != sorted(set(widths)) or not widths or widths[0] < 1 or widths[-1] != self.bits:
                raise ValueError(f"{what} must ascend and end with bits={self.bits}")
        if not set(self.tables) <= set(self.precisions) >= set(self.weights) or not self.weights:
            raise ValueError("tables and weights must be among precisions, and weights not empty")
        if self.stream not in (None, *self.precisions):
            raise ValueError("stream must be one of precisions")
        if min(self.weights.values()) <= 0:
            raise ValueError("weights must be positive; leave a width out to ignore it")
        return self

    def plan(self, shape: tuple[int, int]) -> Form:
        """One nested affine code term over all columns."""
        facts = {"kind": "nested_affine", "bits": self.bits, "group_size": self.columns_per_group(shape[1])}
        widths = {"precisions": list(self.precisions), "tables": list(self.tables)}
        return {"shape": list(shape), "terms": [{"term": "code", "columns": [0, shape[1]], **facts, **widths}]}

    def quantize(self, weight: Tensor, stats: InputStats) -> list[Term]:
        """One nested affine code term."""
        codes, grid, _ = self.solve(weight, stats)
        return [CodeTerm.from_codes(codes, grid)]

    def solve(self, weight: Tensor, stats: InputStats) -> tuple[Tensor, NestedAffine, dict[int, float]]:
        """Codes uint8 [N, K], the grids they refer to, and by width with a weight the loss of the column walk.

        No calibration token at all means white input. The loss is 1/2 tr(E_p H E_p^T), H damped, with feedback "own",
        before any refit; with "mean" that of the mean residual.
        """
        seen = stats.hessian if stats.hessian is not None and stats.tokens else torch.eye(weight.shape[1])
        weight, hessian = prepare(weight, seen)
        grid = self.nest(self.fit(weight, hessian.diagonal()))
        order = column_order(self.order, hessian.diagonal(), grid.group_size)
        upper, damping = factor(hessian[order][:, order], self.damping)
        levels = Levels(grid, self.emphasis(), order // grid.group_size)
        copies = len(levels.widths) if self.feedback == "own" else 1
        stops = block_stops(levels.group, self.block, whole_groups=False)
        solved, losses = solve(weight[:, order].repeat(copies, 1), upper, levels.quantize, stops)
        codes = torch.empty(weight.shape, dtype=torch.uint8)
        codes[:, order] = solved[: len(weight)]
        loss = losses.view(copies, -1).sum(1).expand(len(levels.widths)).tolist()
        hessian.diagonal().add_(damping * hessian.diagonal().mean())
        for _ in range(self.refit):
            grid = refit(weight, hessian, codes, grid, self.emphasis())
            levels = Levels(grid, self.emphasis(), order // grid.group_size)
            codes = descend(weight, hessian, codes, grid, levels, order, self.block)
        if self.refit:
            grid = refit(weight, hessian, codes, grid, self.emphasis())
        return codes, grid, dict(zip(levels.widths, loss, strict=True))

    def emphasis(self) -> dict[int, float]:
        """lambda_p 4^p by ascending width, the largest 1."""
        scaled = {width: weight * 4.0**width for width, weight in sorted(self.weights.items())}
        return {width: value / max(scaled.values()) for width, value in scaled.items()}

    def nest(self, grid: Affine) -> NestedAffine:
        """Every width on the same `grid` of the stored width."""
        assert grid.zero is not None
        zeros = dict.fromkeys(self.tables, grid.zero)
        ratios = {t: torch.full_like(grid.zero, RATIO_ONE) for t in self.tables[:-1]}
        return NestedAffine(self.bits, grid.group_size, self.precisions, grid.scale, zeros, ratios)

    def _loss(self, grid: Affine, weight: Tensor, importance: Tensor | None) -> Tensor:
        """The error of a shared range: that of every width by its emphasis; one width is exactly GPTQ's search."""
        if len(self.weights) == 1 and self.bits in self.weights:
            return super()._loss(grid, weight, importance)
        nested, codes = self.nest(grid), grid.encode(weight)
        lost = torch.zeros_like(weight)
        for width, emphasis in self.emphasis().items():
            lost += emphasis * (nested.decode(codes, width) - weight).square()
        if importance is not None:
            lost *= importance
        return by_group(lost, grid.group_size).sum(-1)
