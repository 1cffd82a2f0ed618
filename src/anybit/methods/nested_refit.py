"""Grids for given codes, codes for given grids: both by exact minimisation of tr(E H E^T), E = W - W_p, per width.

Grids: W_p = scale_g (m - zero_g) is linear in (scale, -scale * zero), 2 G unknowns a row, whose least squares solution
weighs the groups against each other through H. Codes: coordinate descent, one column at a time (QuantEase, arXiv
2309.01885, minimises the same over one width).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from anybit.formats.decoder import by_group, groups
from anybit.formats.nested_affine import RATIO_ONE, NestedAffine, middle
from anybit.methods.gptq import block_stops
from anybit.methods.nested_choice import Levels

ROWS = 256
RIDGE = 1e-3  # of the mean diagonal of the normal equations: a group whose codes are all equal has no unique solution


def refit(weight: Tensor, hessian: Tensor, codes: Tensor, grid: NestedAffine) -> NestedAffine:
    """The tabled grids with the least tr(E H E^T) for the codes, in their stored form; a row it does not help at some
    width keeps that width's tables. weight float32 [N, K], hessian float32 [K, K], codes uint8 [N, K]."""
    scales: dict[int, Tensor] = {}
    zeros: dict[int, Tensor] = {}
    for table in grid.zeros:
        scale, zero = grid.grid(table)
        best = [
            _solve_rows(weight[rows], hessian, middle(codes[rows], grid.bits - table), scale[rows], zero[rows])
            for rows in (slice(i, i + ROWS) for i in range(0, len(weight), ROWS))
        ]
        scales[table] = torch.cat([found for found, _ in best])
        zeros[table] = torch.cat([found for _, found in best])
    fitted = _store(grid, scales, zeros)
    return _better(weight, hessian, codes, grid, fitted)


def row_losses(weight: Tensor, hessian: Tensor, values: Tensor) -> Tensor:
    """tr(E H E^T) by row: float32 [N]."""
    error = weight - values
    return ((error @ hessian) * error).sum(1)


def _solve_rows(
    weight: Tensor, hessian: Tensor, middles: Tensor, scale: Tensor, zero: Tensor
) -> tuple[Tensor, Tensor]:
    """Least squares (scale, zero) float32 [R, G] near the given ones, zero rounded and scale solved for once more."""
    size = -(-weight.shape[1] // scale.shape[1])
    size = _group_size(weight.shape[1], scale.shape[1])
    ones = torch.ones_like(middles)
    scale, zero = scale.float(), zero.float()
    offset = -scale * zero
    error = weight - (middles * _spread(scale, size, weight) + _spread(offset, size, weight))
    pushed = error @ hessian
    curvature = _normal(middles, ones, hessian, size)
    right = torch.cat([by_group(pushed * middles, size).sum(-1), by_group(pushed, size).sum(-1)], 1)
    step = _ridge_solve(curvature, right)
    count = scale.shape[1]
    new_scale, new_offset = scale + step[:, :count], offset + step[:, count:]
    usable = new_scale > scale / 4
    new_zero = torch.where(usable, (-new_offset / new_scale).round_().clamp_(0, 255), zero)
    new_scale = torch.where(usable, new_scale, scale)
    return _scales_for(weight, hessian, middles, new_scale, new_zero, size), new_zero


def _scales_for(weight: Tensor, hessian: Tensor, middles: Tensor, scale: Tensor, zero: Tensor, size: int) -> Tensor:
    """Least squares scales [R, G] for zeros that stay."""
    basis = middles - _spread(zero, size, weight)
    pushed = (weight - basis * _spread(scale, size, weight)) @ hessian
    step = _ridge_solve(_products(basis, basis, hessian, size), by_group(pushed * basis, size).sum(-1))
    found = scale + step
    return torch.where(found > scale / 4, found, scale)


def _normal(middles: Tensor, ones: Tensor, hessian: Tensor, size: int) -> Tensor:
    """Normal matrices [R, 2 G, 2 G] of (scale, offset)."""
    mixed = _products(middles, ones, hessian, size)
    flat = _products(ones[:1], ones[:1], hessian, size).expand(len(middles), -1, -1)
    top = torch.cat([_products(middles, middles, hessian, size), mixed], 2)
    return torch.cat([top, torch.cat([mixed.transpose(1, 2), flat], 2)], 1)


def _products(a: Tensor, b: Tensor, hessian: Tensor, size: int) -> Tensor:
    """sum over k in group g, l in group h of a_k H_kl b_l: [R, G, G] for a, b [R, K]."""
    rows = []
    for start in range(0, a.shape[1], size):
        part = a[:, start : start + size] @ hessian[start : start + size]
        rows.append(by_group(part * b, size).sum(-1))
    return torch.stack(rows, 1)


def _ridge_solve(matrix: Tensor, right: Tensor) -> Tensor:
    """matrix^-1 right by row after scaling the diagonal to ones and adding `RIDGE` to it; [R, n]."""
    norm = matrix.diagonal(dim1=1, dim2=2).clamp_min(1e-20).rsqrt()
    scaled = matrix * norm[:, :, None] * norm[:, None, :]
    scaled.diagonal(dim1=1, dim2=2).add_(RIDGE)
    factor, _ = torch.linalg.cholesky_ex(scaled)
    return torch.cholesky_solve((right * norm)[:, :, None], factor)[:, :, 0].nan_to_num_(0, 0, 0) * norm


def _group_size(columns: int, count: int) -> int:
    return -(-columns // count)


def _spread(table: Tensor, size: int, like: Tensor) -> Tensor:
    return table.repeat_interleave(size, 1)[:, : like.shape[1]]


def _store(grid: NestedAffine, scales: Mapping[int, Tensor], zeros: Mapping[int, Tensor]) -> NestedAffine:
    """Tables in stored form: the full width's scale as float16, the others as its multiples in 128ths."""
    scale = scales[grid.bits].clamp_min(2.0**-24).half()
    ratios = {
        table: (found * RATIO_ONE / scale.float()).round_().clamp_(1, 255).to(torch.uint8)
        for table, found in scales.items()
        if table != grid.bits
    }
    small = {table: zero.to(torch.uint8) for table, zero in zeros.items()}
    return NestedAffine(grid.bits, grid.group_size, grid.precisions, scale, small, ratios)


def _better(
    weight: Tensor, hessian: Tensor, codes: Tensor, old: NestedAffine, new: NestedAffine
) -> NestedAffine:
    """Row by row the new tables unless some tabled width got worse by them (they share a scale, so all or none)."""
    keep = torch.zeros(len(weight), dtype=torch.bool)
    for table in old.zeros:
        before = row_losses(weight, hessian, old.decode(codes, table))
        keep |= row_losses(weight, hessian, new.decode(codes, table)) > before
    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(keep[:, None], a, b)
    zeros = {t: pick(old.zeros[t], new.zeros[t]) for t in old.zeros}
    ratios = {t: pick(old.ratios[t], new.ratios[t]) for t in old.ratios}
    return NestedAffine(old.bits, old.group_size, old.precisions, pick(old.scale, new.scale), zeros, ratios)


def descend(
    weight: Tensor,
    hessian: Tensor,
    codes: Tensor,
    grid: NestedAffine,
    emphasis: Mapping[int, float],
    order: Tensor,
    block: int,
) -> Tensor:
    """Codes uint8 [N, K] after one sweep, in `order`, of the best code for each column with all others as they are.

    Never raises sum_p emphasis_p tr(E_p H E_p^T). With G = E H, the best real value of column k is value + G_k / H_kk.
    """
    levels = Levels(grid, emphasis, order // grid.group_size)
    hessian = hessian[order][:, order].contiguous()
    diagonal = hessian.diagonal()
    error = torch.cat([weight - grid.decode(codes, width) for width in levels.widths])[:, order]
    pull = (error @ hessian).t().contiguous()  # [K, L * N]
    found = codes[:, order].t().contiguous()
    stops = block_stops(levels.group, block, whole_groups=False)
    for start, stop in itertools.pairwise((0, *stops)):
        changes = torch.empty(stop - start, pull.shape[1])
        for i in range(start, stop):
            old = levels.values(found[i], i)
            found[i], new = levels.choose(old + (pull[i] / diagonal[i]).view_as(old), i)
            changes[i - start] = (new - old).view(-1)
            pull[start:stop].addr_(hessian[start:stop, i], changes[i - start], alpha=-1)
        pull[:start].addmm_(hessian[:start, start:stop], changes, alpha=-1)
        pull[stop:].addmm_(hessian[stop:, start:stop], changes, alpha=-1)
    result = torch.empty_like(codes)
    result[:, order] = found.t()
    return result


