"""Binary-coded weights that answer for the layer's output: planes and scales that lower sum_p e_p tr(E_p H E_p^T), E_p =
W - W_p, for several widths p that share their planes.

As for uniform nested weights (`nested.py`, `nested_refit.py`): a column walk with GPTQ's error feedback chooses the planes,
every width with a running target of its own; then least squares through H gives all scales of a row, width by width, and a
sweep of coordinate descent chooses the planes anew. Here every width has a scale per plane and its own offset, so the widths
meet only in the choice of the code, and that is made by trying all of them: for 2^4 codes, not for 2^8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from anybit.formats.binary_coded import BinaryCoded
from anybit.formats.decoder import by_group
from anybit.methods.column_solver import factor, prepare, solve
from anybit.methods.gptq import block_stops, column_order
from anybit.methods.nested_refit import descend, solve_near

ROWS = 128  # rows refitted at a time: their normal equations take (G (p + 1))^2 floats each

STEP = 4  # bits chosen at once, by trying all 2^STEP
REACH = 3.0  # standard deviations of what is left that the added planes cover at first


@dataclass(frozen=True)
class Aim:
    """What to solve for: `emphasis` e_p by width (the largest is the width stored), GPTQ's `damping`, `rounds` of new scales
    and new planes, and how many columns a delayed update takes (`block`)."""

    emphasis: Mapping[int, float]
    damping: float
    rounds: int
    block: int = 128


class BinaryLevels:
    """The levels of the widths that count, ready to be used column by column (the protocol of `nested_choice.Levels`).

    `group` int64 [K] says which group the i-th column visited belongs to; `first` uint8 [K, N], if any, has the first
    `first_bits` bits of every code of that column, which stay as they are.
    """

    def __init__(
        self,
        coded: BinaryCoded,
        emphasis: Mapping[int, float],
        group: Tensor,
        first: Tensor | None = None,
        first_bits: int = 0,
    ) -> None:
        self.widths, self.group, self._bits = tuple(sorted(emphasis)), group.tolist(), coded.bits
        levels = [coded.levels(width).permute(1, 2, 0).contiguous() for width in self.widths]  # [G, 2^p, N]
        self._levels = [part.unflatten(1, (2**first_bits, -1)) for part in levels]
        self._emphasis = [emphasis[width] for width in self.widths]
        self._first, self._first_bits = first, first_bits

    def choose(self, targets: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """For targets float32 [L, N] of the i-th column: the codes uint8 [N] with the least sum of emphasis * (target -
        value)^2, the lowest of several, and their values float32 [L, N]."""
        cost = torch.zeros(1, targets.shape[1])
        for levels, emphasis, target in zip(self._levels, self._emphasis, targets, strict=True):
            own = (self._open(levels[self.group[i]], i) - target).square_().mul_(emphasis)
            cost = (own.unflatten(0, (len(cost), -1)) + cost[:, None]).flatten(0, 1)
        codes = cost.argmin(0).to(torch.uint8)
        if self._first is not None:
            codes += self._first[i] << (self._bits - self._first_bits)
        return codes, self.values(codes, i)

    def values(self, codes: Tensor, i: int) -> Tensor:
        """Values float32 [L, N] of codes [N] of the i-th column."""
        found = [
            levels[self.group[i]].flatten(0, 1).gather(0, (codes >> (self._bits - width)).long()[None])
            for width, levels in zip(self.widths, self._levels, strict=True)
        ]
        return torch.cat(found)

    def _open(self, levels: Tensor, i: int) -> Tensor:
        """Of levels [2^first_bits, 2^(p - first_bits), N] those that column i can still take, [2^(p - first_bits), N]."""
        if self._first is None:
            return levels[0]
        return levels.gather(0, self._first[i].long().expand(1, levels.shape[1], -1))[0]

    def quantize(self, rest: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """A `column_solver.Quantizer` over rows [L * N]: a target for every width."""
        codes, values = self.choose(rest[i].view(len(self.widths), -1), i)
        return codes.repeat(len(self.widths)), values.flatten()


def stages(widths: Sequence[int]) -> list[list[int]]:
    """`widths` ascending, cut so that each part adds at most `STEP` bits where the widths allow it."""
    parts: list[list[int]] = []
    done = 0
    for width in widths:
        if parts and width <= done + STEP:
            parts[-1].append(width)
        else:
            done = parts[-1][-1] if parts else 0
            parts.append([width])
    return parts


def solve_planes(
    weight: Tensor, hessian: Tensor, start: BinaryCoded, aims: Sequence[Aim]
) -> tuple[Tensor, BinaryCoded]:
    """Codes uint8 [N, K] and scales for weight float32 [N, K] under hessian [K, K], begun with the scales of `start`.

    The widths of one aim are solved for together, with the planes of the aims before as they are.
    """
    weight, hessian = prepare(weight, hessian)
    order = column_order("activation", hessian.diagonal(), start.group_size)
    upper, damping = factor(hessian[order][:, order], aims[0].damping)
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    codes, coded = None, start
    for aim in aims:
        if codes is not None:
            coded = _widened(weight, codes, coded, aim.emphasis)
        codes, coded = _solve_stage(weight, hessian, (order, upper), (codes, coded), aim)
    assert codes is not None
    return codes, coded


def _solve_stage(
    weight: Tensor, hessian: Tensor, walk: tuple[Tensor, Tensor], start: tuple[Tensor | None, BinaryCoded], aim: Aim
) -> tuple[Tensor, BinaryCoded]:
    (order, upper), (given, coded) = walk, start
    group, rows = order // coded.group_size, len(weight)
    known = (
        (None, 0)
        if given is None
        else (given[:, order].t().contiguous(), max(p for p in coded.alphas if p not in aim.emphasis))
    )
    levels = BinaryLevels(coded, aim.emphasis, group, *known)
    stops = block_stops(levels.group, aim.block, whole_groups=False)
    solved, _ = solve(weight[:, order].repeat(len(levels.widths), 1), upper, levels.quantize, stops)
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    codes[:, order] = solved[:rows]
    for _ in range(aim.rounds):
        coded = refit(weight, hessian, codes, coded, aim.emphasis)
        levels = BinaryLevels(coded, aim.emphasis, group, *known)
        codes = descend(weight, hessian, codes, coded, levels, order, aim.block)
    return codes, refit(weight, hessian, codes, coded, aim.emphasis) if aim.rounds else coded


def _widened(weight: Tensor, codes: Tensor, coded: BinaryCoded, widths: Mapping[int, float]) -> BinaryCoded:
    """`coded` with scales for wider `widths` as well: those it has, then halves of halves, to reach what is left."""
    bits = max(widths)
    left = by_group(weight - coded.decode(codes), coded.group_size).square().mean(-1).sqrt()
    more = left[..., None] * REACH * 0.5 ** torch.arange(1, bits - coded.bits + 1)
    scales = torch.cat([coded.alphas[coded.bits].float(), more], -1).half()
    offsets = None
    if coded.offsets is not None:
        offsets = coded.offsets | dict.fromkeys(widths, coded.offsets[coded.bits])
    alphas = coded.alphas | {width: scales[..., :width].contiguous() for width in widths}
    return BinaryCoded(bits, coded.group_size, alphas, offsets)


def refit(
    weight: Tensor, hessian: Tensor, codes: Tensor, coded: BinaryCoded, emphasis: Mapping[int, float]
) -> BinaryCoded:
    """The float16 scales with the least tr(E_p H E_p^T) for the codes uint8 [N, K], for every width p in `emphasis`.

    A row whose new scales are no better once rounded keeps the old ones.
    """
    alphas, offsets = dict(coded.alphas), dict(coded.offsets or {})
    for width in emphasis:
        parts = [
            _refit_rows(weight[rows], hessian, codes[rows], _rows(coded, rows), width)
            for rows in (slice(start, start + ROWS) for start in range(0, len(weight), ROWS))
        ]
        alphas[width] = torch.cat([part.alphas[width] for part in parts])
        if coded.offsets is not None:
            offsets[width] = torch.cat([part.offsets[width] for part in parts if part.offsets])
    return replace(coded, alphas=alphas, offsets=offsets if coded.offsets is not None else None)


def _refit_rows(weight: Tensor, hessian: Tensor, codes: Tensor, coded: BinaryCoded, width: int) -> BinaryCoded:
    size, old = coded.group_size, coded.alphas[width].float().transpose(1, 2)
    shifts = torch.arange(coded.bits - 1, coded.bits - 1 - width, -1)
    basis = ((codes[:, None] >> shifts[:, None]) & 1).float() * 2 - 1  # [N, p, K]
    if coded.offsets is not None:
        basis = torch.cat([basis, torch.ones_like(basis[:, :1])], 1)
        old = torch.cat([old, coded.offsets[width].float()[:, None]], 1)
    matrix, towards = _normal(weight, hessian, basis, size)
    found = solve_near(matrix, towards, old.reshape(len(weight), -1)).view_as(old)
    alphas = found[:, :width].transpose(1, 2).contiguous().half()
    offsets = {width: found[:, width].contiguous().half()} if coded.offsets is not None else None
    new = BinaryCoded(coded.bits, size, {width: alphas}, offsets)
    better = _lost(weight, hessian, codes, new, width) < _lost(weight, hessian, codes, coded, width)
    alphas = torch.where(better[:, None, None], alphas, coded.alphas[width])
    if offsets is not None and coded.offsets is not None:
        offsets = {width: torch.where(better[:, None], offsets[width], coded.offsets[width])}
    return BinaryCoded(coded.bits, size, {width: alphas}, offsets)


def _normal(weight: Tensor, hessian: Tensor, basis: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Normal equations of the factors of `basis` [N, p, K] in every group: [N, p G, p G] and [N, p G].

    Between plane i in group g and plane j in group h the former have sum over k in g, l in h of b_ik H_kl b_jl.
    """
    missing = -basis.shape[2] % size
    towards = pad((weight @ hessian)[:, None] * basis, (0, missing)).unflatten(2, (-1, size)).sum(-1)
    basis, hessian = pad(basis, (0, missing)), pad(hessian, (0, missing, 0, missing))
    grouped = basis.unflatten(2, (-1, size)).permute(0, 2, 3, 1).contiguous()  # [N, G, g, p]
    rows, count, _, terms = grouped.shape
    matrix = torch.empty(rows, terms, count, terms, count)
    for group in range(count):
        start = group * size
        pushed = basis[..., start : start + size] @ hessian[start : start + size, start:]  # symmetric: half will do
        part = pushed.unflatten(2, (-1, size)).transpose(1, 2) @ grouped[:, group:]  # [N, G - group, p, p]
        matrix[:, :, group, :, group:] = part.permute(0, 2, 3, 1)
        matrix[:, :, group:, :, group] = part.permute(0, 3, 1, 2)
    return matrix.view(rows, terms * count, -1), towards.flatten(1)


def _lost(weight: Tensor, hessian: Tensor, codes: Tensor, coded: BinaryCoded, width: int) -> Tensor:
    error = weight - coded.decode(codes, width)
    return ((error @ hessian) * error).sum(1)


def _rows(coded: BinaryCoded, rows: slice) -> BinaryCoded:
    offsets = None if coded.offsets is None else {p: offset[rows] for p, offset in coded.offsets.items()}
    return replace(coded, alphas={p: alpha[rows] for p, alpha in coded.alphas.items()}, offsets=offsets)
