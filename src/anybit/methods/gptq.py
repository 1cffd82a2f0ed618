"""GPTQ (Frantar et al., arXiv 2210.17323): second-order weight quantization, column by column.

weight [N, K], H = 2/T X^T X [K, K] over the tokens this layer saw. Steps: neutralise dead inputs; fit grids; order columns; damp
H by `damping` * mean(diag H); factor once; walk the columns (`column_solver.py`).

order          "natural"; "activation" = descending diag H (act-order); "group" = descending diag H inside each group,
               groups by their largest diag H (GPTQModel's group-aware order), so that a group's columns are solved
               together.
static_groups  grids fitted to the original weights before the walk; else each group is fitted when the walk reaches
               it, to the weights as updated by then (the fresh block-local ones; the reference code reads stale ones
               when g < block). "activation" order needs static groups: groups stay contiguous in K and no gather is
               needed at run time.

first_token_weight   beyond the paper (1 = the paper): attention parks on the first token of a sequence (the attention sink), so
               its key and value reach every later token, yet H counts it once among T and plain GPTQ pushes error into
               just that direction. The recipe counts it as many tokens in H, for linears whose outputs other tokens read.

Defaults: the paper's damping 0.01 and block 128; order and static groups as the paper's later "act-order + static groups".
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from anybit.formats.affine import Affine
from anybit.formats.terms import CodeTerm, Term
from anybit.methods.base import InputStats
from anybit.methods.column_solver import Solution, factor, prepare, solve
from anybit.methods.grid import AffineGrid


class GPTQ(AffineGrid):
    """Options: those of the grid, and those explained above; `damping` in 0..1, `block` = columns per delayed
    update."""

    name: ClassVar[str] = "gptq"
    balances: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    order: Literal["natural", "activation", "group"] = "activation"
    static_groups: bool = True
    damping: float = Field(default=0.01, gt=0, lt=1)
    block: int = Field(default=128, ge=1)
    first_token_weight: float = Field(default=1.0, ge=1)

    @model_validator(mode="after")
    def _groups_stay_contiguous(self) -> Self:
        if self.order == "activation" and not self.static_groups:
            raise ValueError("order 'activation' needs static_groups=true (or use order 'group')")
        return self

    def quantize(self, weight: Tensor, stats: InputStats) -> list[Term]:
        """One affine code term."""
        solution, grid = self.solve(weight, stats)
        return [CodeTerm.from_codes(solution.codes, grid)]

    def solve(self, weight: Tensor, stats: InputStats) -> tuple[Solution, Affine]:
        """Codes in natural column order with their loss, and the grid they refer to."""
        assert stats.hessian is not None
        weight, hessian = prepare(weight, stats.hessian)
        first = self.fit(weight, hessian.diagonal())
        order = column_order(self.order, hessian.diagonal(), first.group_size)
        group = (order // first.group_size).tolist()
        columns = _Columns(first, group, None if self.static_groups else self, hessian.diagonal()[order], self.steps)
        upper, damping = factor(hessian[order][:, order], self.damping)
        stops = block_stops(group, self.block, whole_groups=not self.static_groups)
        codes, losses = solve(weight[:, order], upper, columns.quantize, stops)
        natural = torch.empty_like(codes)
        natural[:, order] = codes
        return Solution(natural, float(losses.sum()), damping), columns.grid()


def column_order(order: str, importance: Tensor, group_size: int) -> Tensor:
    """int64 [K]: the original index of each column in solver order; `importance` is diag H [K]."""
    columns = len(importance)
    if order == "natural":
        return torch.arange(columns)
    if order == "activation":
        return importance.argsort(descending=True, stable=True)
    starts = range(0, columns, group_size)
    inner = [importance[s : s + group_size].argsort(descending=True, stable=True) + s for s in starts]
    peaks = torch.stack([importance[run[0]] for run in inner])
    return torch.cat([inner[int(g)] for g in peaks.argsort(descending=True, stable=True)])


def block_stops(group: list[int], block: int, whole_groups: bool) -> list[int]:
    """Block ends: every `block` columns, moved on to the end of a group when groups must stay whole."""
    stops, start = [], 0
    for stop in range(1, len(group) + 1):
        inside = stop < len(group) and whole_groups and group[stop] == group[stop - 1]
        if stop == len(group) or (stop - start >= block and not inside):
            stops.append(stop)
            start = stop
    return stops


class _Columns:
    """The grid of each column's group in solver order; `refit` fits a group again when the walk enters it."""

    def __init__(self, first: Affine, group: list[int], refit: GPTQ | None, importance: Tensor, steps: int) -> None:
        self._bits, self._group_size, self._symmetric = first.bits, first.group_size, first.zero is None
        self._steps = steps
        self._group, self._refit, self._importance = group, refit, importance
        self._scale = first.scale.float().t().contiguous()
        middle = torch.full_like(self._scale, 2.0 ** (first.bits - 1))
        self._zero = middle if first.zero is None else first.zero.float().t().contiguous()

    def quantize(self, rest: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """A `column_solver.Quantizer`."""
        g = self._group[i]
        if self._refit is not None and (i == 0 or self._group[i - 1] != g):
            run = slice(i, i + self._group.count(g))
            fitted = self._refit.fit(rest[run].t(), self._importance[run])
            self._scale[g] = fitted.scale[:, 0].float()
            if fitted.zero is not None:
                self._zero[g] = fitted.zero[:, 0].float()
        scale, zero = self._scale[g], self._zero[g]
        codes = (rest[i] / scale).round_().add_(zero).clamp_(0, self._steps)
        return codes.to(torch.uint8), (codes - zero) * scale

    def grid(self) -> Affine:
        """The grid with every group as last fitted."""
        zero = None if self._symmetric else self._zero.t().contiguous().to(torch.uint8)
        return Affine(self._bits, self._group_size, self._scale.t().contiguous().half(), zero)
