"""Grids for given codes, codes for given grids: both lower sum_p emphasis_p tr(E_p H E_p^T), E_p = W - W_p.

Grids: W_p = scale_g (middle - zero_g) is linear in (scale, -scale * zero), 2 G unknowns a row, whose least squares solution
weighs the groups against each other through H. Codes: coordinate descent, one column at a time (QuantEase, arXiv
2309.01885, does so for one width).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anybit.formats.binary_coded import BinaryCoded
from anybit.formats.decoder import by_group
from anybit.formats.form import RATIO_ONE
from anybit.formats.nested_affine import NestedAffine, middle
from anybit.methods.gptq import block_stops
from anybit.methods.nested_choice import Levels

if TYPE_CHECKING:
    from anybit.methods.binary_solver import BinaryLevels

ROWS = 256  # rows refitted at a time: their normal equations take 4 G^2 floats each
RIDGE = 1e-3  # of the unit diagonal of the normal equations: a group whose codes are all equal has no unique solution
LEAST_SCALE = 0.25  # a refit that shrinks a scale below this share of what it was is ill-conditioned, not better


def refit(
    weight: Tensor, hessian: Tensor, codes: Tensor, grid: NestedAffine, emphasis: Mapping[int, float]
) -> NestedAffine:
    """The grids with the least error for the codes uint8 [N, K], in stored form; weight float32 [N, K], hessian [K, K].

    Each table minimises the error of the widths that read it and have an emphasis. Rows that rounding to the stored form
    would make worse keep their tables.
    """
    parts = [slice(start, start + ROWS) for start in range(0, len(weight), ROWS)]
    fitted = [_refit_rows(weight[rows], hessian, codes[rows], _rows(grid, rows), emphasis) for rows in parts]
    return replace(
        grid,
        scale=torch.cat([part.scale for part in fitted]),
        zeros={table: torch.cat([part.zeros[table] for part in fitted]) for table in grid.zeros},
        ratios={table: torch.cat([part.ratios[table] for part in fitted]) for table in grid.ratios},
    )


def descend(
    weight: Tensor,
    hessian: Tensor,
    codes: Tensor,
    grid: NestedAffine | BinaryCoded,
    levels: Levels | BinaryLevels,
    order: Tensor,
    block: int,
) -> Tensor:
    """Codes uint8 [N, K] after one sweep, in `order`, of the best code for each column with all others as they are.

    `levels` are those of `grid`, columns in `order`. Never raises the error. With G = E H, the best real value of column k
    is its value + G_k / H_kk.
    """
    hessian = hessian[order][:, order].contiguous()
    diagonal = hessian.diagonal()
    error = torch.cat([weight - grid.decode(codes, width) for width in levels.widths])[:, order]
    pull = (error @ hessian).t().contiguous()  # G, [K, L * N]
    found = codes[:, order].t().contiguous()
    stops = block_stops(levels.group, block, whole_groups=False)
    for start, stop in itertools.pairwise((0, *stops)):
        changes = torch.empty(stop - start, pull.shape[1])
        for i in range(start, stop):
            old = levels.values(found[i], i)
            found[i], new = levels.choose(old + (pull[i] / diagonal[i]).view_as(old), i)
            changes[i - start] = (new - old).view(-1)
            pull[i + 1 : stop].addr_(hessian[i + 1 : stop, i], changes[i - start], alpha=-1)
        # Columns already visited are not looked at again.
        pull[stop:].addmm_(hessian[stop:, start:stop], changes, alpha=-1)
    result = torch.empty_like(codes)
    result[:, order] = found.t()
    return result


def weighted_losses(
    weight: Tensor, hessian: Tensor, codes: Tensor, grid: NestedAffine, emphasis: Mapping[int, float]
) -> Tensor:
    """sum_p emphasis_p tr(E_p H E_p^T) by row: float32 [N]."""
    total = torch.zeros(len(weight))
    for width, factor in emphasis.items():
        error = weight - grid.decode(codes, width)
        total += factor * ((error @ hessian) * error).sum(1)
    return total


@dataclass(frozen=True)
class _Normal:
    """Normal equations of a row's (scale, offset): sums over k in g, l in h of m_k H_kl m_l, m_k H_kl, H_kl
    [R or 1, G, G], and of m_k H_kl w_l, H_kl w_l [R, G]."""

    mm: Tensor
    m1: Tensor
    one: Tensor
    mw: Tensor
    w1: Tensor

    def plus(self, other: _Normal, factor: float) -> _Normal:
        names = ("mm", "m1", "one", "mw", "w1")
        return _Normal(*(getattr(self, name) + factor * getattr(other, name) for name in names))

    def fit(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, zero) float32 [R, G] of least error near the given ones; the zero rounded, then the scale once more."""
        top = torch.cat([self.mm, self.m1], 2)
        matrix = torch.cat([top, torch.cat([self.m1.transpose(1, 2), self.one.expand_as(self.mm)], 2)], 1)
        start = torch.cat([scale, -scale * zero], 1)
        found = solve_near(matrix, torch.cat([self.mw, self.w1], 1), start)
        new_scale, offset = found.chunk(2, 1)
        usable = new_scale > LEAST_SCALE * scale
        zero = torch.where(usable, (-offset / new_scale).round_().clamp_(0, 255), zero)
        near = torch.where(usable, new_scale, scale)
        across, down = zero[:, None, :], zero[:, :, None]
        matrix = self.mm - self.m1 * across - self.m1.transpose(1, 2) * down + self.one * across * down
        found = solve_near(matrix, self.mw - zero * self.w1, near)
        return torch.where(found > LEAST_SCALE * scale, found, near), zero


def _normal(weight: Tensor, hessian: Tensor, middles: Tensor, size: int) -> _Normal:
    starts = range(0, weight.shape[1], size)
    pushed = [middles[:, start : start + size] @ hessian[start : start + size] for start in starts]
    mm = torch.stack([by_group(part * middles, size).sum(-1) for part in pushed], 1)
    m1 = torch.stack([by_group(part, size).sum(-1) for part in pushed], 1)
    one = by_group(by_group(hessian, size).sum(-1).t().contiguous(), size).sum(-1)[None]
    towards = weight @ hessian
    return _Normal(mm, m1, one, by_group(towards * middles, size).sum(-1), by_group(towards, size).sum(-1))


def solve_near(matrix: Tensor, right: Tensor, start: Tensor) -> Tensor:
    """x [R, n] with matrix x = right, by row, pulled towards `start` by `RIDGE` where the matrix does not say."""
    norm = matrix.diagonal(dim1=1, dim2=2).clamp_min(1e-20).rsqrt()
    scaled = matrix * norm[:, :, None] * norm[:, None, :]
    scaled.diagonal(dim1=1, dim2=2).add_(RIDGE)
    lower, failed = torch.linalg.cholesky_ex(scaled)
    missing = right - (matrix @ start[:, :, None])[:, :, 0]
    step = torch.cholesky_solve((missing * norm)[:, :, None], lower)[:, :, 0] * norm
    return start + torch.where((failed == 0)[:, None] & step.isfinite(), step, 0)


def _refit_rows(
    weight: Tensor, hessian: Tensor, codes: Tensor, grid: NestedAffine, emphasis: Mapping[int, float]
) -> NestedAffine:
    scales, zeros = {}, {}
    for table in grid.zeros:
        readers = {p: e for p, e in emphasis.items() if min(t for t in grid.zeros if t >= p) == table} or {table: 1.0}
        equations: _Normal | None = None
        for width, factor in readers.items():
            found = _normal(weight, hessian, middle(codes, grid.bits - width), grid.group_size)
            equations = found if equations is None else equations.plus(found, factor / next(iter(readers.values())))
        scale, zero = grid.grid(table)
        assert equations is not None
        scales[table], zeros[table] = equations.fit(scale.float(), zero.float())
    new = _stored(grid, scales, zeros)
    before, after = (weighted_losses(weight, hessian, codes, found, emphasis) for found in (grid, new))
    better = (after < before)[:, None]
    return replace(
        grid,
        scale=torch.where(better, new.scale, grid.scale),
        zeros={t: torch.where(better, new.zeros[t], grid.zeros[t]) for t in grid.zeros},
        ratios={t: torch.where(better, new.ratios[t], grid.ratios[t]) for t in grid.ratios},
    )


def _stored(grid: NestedAffine, scales: Mapping[int, Tensor], zeros: Mapping[int, Tensor]) -> NestedAffine:
    """Tables in stored form: the full width's scale as float16, the others' in 128ths of it."""
    scale = scales[grid.bits].clamp(2.0**-24, 65504).half()
    ratios = {
        table: (found * RATIO_ONE / scale.float()).round_().clamp_(1, 255).to(torch.uint8)
        for table, found in scales.items()
        if table != grid.bits
    }
    return replace(grid, scale=scale, zeros={t: zero.to(torch.uint8) for t, zero in zeros.items()}, ratios=ratios)


def _rows(grid: NestedAffine, rows: slice) -> NestedAffine:
    return replace(
        grid,
        scale=grid.scale[rows],
        zeros={t: zero[rows] for t, zero in grid.zeros.items()},
        ratios={t: ratio[rows] for t, ratio in grid.ratios.items()},
    )
