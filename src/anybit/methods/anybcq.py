"""AnyBCQ (arXiv 2510.10467): nested binary-coded weights, W ~ offset + sum_{i<=p} alpha_i^(p) B_i with B_i in {-1, +1}.

Per row and group. The base precision starts greedily (offset = mean, then again and again B = sign of what is left, alpha =
its mean size) and alternates `iterations` times between least squares for its scales and the nearest level for every
weight. Each further bit keeps all planes, adds B_p = sign(W - What) and alternates between least squares for *all* scales
of the new precision and B_p = sign of what the other planes leave. So planes are shared and every precision has scales of
its own. The paper then trains the scales on the block's output: the recipe's stage `compensate` (`tune_tables.py`).

weighting   "none": plain squared error, the paper's; "hessian": column k counts H_kk times (ours), and the base starts from
            the plain greedy planes as well as from the weighted ones; each group keeps the better.
group_size  128 in the paper. Each precision stores p + 1 float16 numbers a group: for 2, 3, 4, 6 and 8 bits together 3.5
            bits a weight in groups of 128, 14 in groups of 32.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from anybit.formats.binary_coded import BinaryCoded
from anybit.formats.decoder import Form, by_group, groups
from anybit.formats.terms import CodeTerm, Term
from anybit.methods.base import InputStats, Method

BLOCK_WEIGHTS = 1 << 16  # weights fitted at a time, so that their planes stay in the cache
RIDGE = 1e-7  # of the group's total weight: makes equal planes (a constant group) solvable, moves nothing else


class AnyBCQ(Method):
    """Options: `bits` stored, `base_bits`, `precisions` that get scales (None: all from base to stored), `group_size`
    (-1 = whole row), `offset` off for planes alone, `iterations`, `weighting`."""

    name: ClassVar[str] = "anybcq"
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    bits: int = Field(default=4, ge=1, le=8)
    base_bits: int = Field(default=2, ge=1, le=8)
    precisions: tuple[int, ...] | None = None
    group_size: int = Field(default=128, ge=-1)
    offset: bool = True
    iterations: int = Field(default=20, ge=0)
    weighting: Literal["none", "hessian"] = "none"

    @model_validator(mode="after")
    def _base_to_stored(self) -> Self:
        scales = self.scales()
        if self.group_size == 0:
            raise ValueError("group_size must be at least 1, or -1 for one group a row")
        if not scales or list(scales) != sorted(set(scales)) or scales[0] < self.base_bits or scales[-1] != self.bits:
            raise ValueError(
                f"precisions must ascend from base_bits ({self.base_bits}) or more to bits ({self.bits}), got {list(scales)}"
            )
        return self

    def scales(self) -> tuple[int, ...]:
        """The precisions with scales, ascending."""
        return self.precisions or tuple(range(self.base_bits, self.bits + 1))

    def plan(self, shape: tuple[int, int]) -> Form:
        """One binary-coded term over all columns."""
        part = {"kind": "binary_coded", "bits": self.bits, "group_size": self._columns_per_group(shape[1])}
        part |= {"precisions": list(self.scales()), "offset": self.offset}
        return {"shape": list(shape), "terms": [{"term": "code", "columns": [0, shape[1]], **part}]}

    def quantize(self, weight: Tensor, stats: InputStats) -> list[Term]:
        """One binary-coded code term."""
        (rows, columns), size = weight.shape, self._columns_per_group(weight.shape[1])
        count = groups(columns, size)
        importance = torch.ones(columns)
        if self.weighting == "hessian" and stats.hessian is not None:
            importance = stats.hessian.diagonal()
        each = normalised(by_group(importance[None], size), by_group(torch.ones(1, columns), size))
        targets = by_group(weight, size)
        step = max(1, BLOCK_WEIGHTS // columns)
        parts = [self._fit(part, each.expand(len(part), -1, -1)) for part in targets.split(step)]
        codes = torch.cat([codes for codes, _ in parts]).view(rows, -1)[:, :columns].contiguous()
        tables = {
            p: torch.cat([scales[p] for _, scales in parts]).view(rows, count, -1).to(torch.float16)
            for p in self.scales()
        }
        offsets = {p: table[..., 0].contiguous() for p, table in tables.items()} if self.offset else None
        alphas = {p: table[..., -p:].contiguous() for p, table in tables.items()}
        return [CodeTerm.from_codes(codes, BinaryCoded(self.bits, size, alphas, offsets))]

    def _columns_per_group(self, columns: int) -> int:
        return columns if self.group_size == -1 else min(self.group_size, columns)

    def _fit(self, target: Tensor, importance: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """Codes uint8 and, by precision, scales (offset first, if any) of groups [R, G, g]; all as [R * G, ...]."""
        target, importance = target.flatten(0, 1), importance.flatten(0, 1)
        fit = self._base(target, importance, importance)
        if self.weighting == "hessian":
            fit.take_better(self._base(target, importance, (importance > 0).float()))
        found = {self.base_bits: fit.scales}
        for bits in range(self.base_bits + 1, self.bits + 1):
            fit.expand()
            for _ in range(self.iterations):
                if not fit.reassign_last():
                    break
                fit.solve()
            found[bits] = fit.scales
        return fit.codes(self.bits), found

    def _base(self, target: Tensor, importance: Tensor, start: Tensor) -> Groups:
        """Groups [C, g] at the base precision, begun with weights `start`."""
        fit = Groups(target, start, self.offset)
        fit.greedy(self.base_bits)
        fit.importance = importance
        fit.solve()
        for _ in range(self.iterations):
            if not fit.assign(self.base_bits):
                break
            fit.solve()
        return fit


class Groups:
    """Groups `target` [C, g] being fitted: `planes` float32 [C, m, g] of +-1 (the offset's ones first) and `scales` [C, m].

    `importance` [C, g] weighs the squared error of each entry; padding has 0.
    """

    def __init__(self, target: Tensor, importance: Tensor, offset: bool) -> None:
        self.target, self.importance, self.offset = target, importance, int(offset)
        self.planes = torch.ones(len(target), self.offset, target.shape[1])
        self.scales = torch.zeros(len(target), self.offset)
        if offset:
            self.solve()

    def left(self, planes: int | None = None) -> Tensor:
        """What the first `planes` (default: all) leave of the target, [C, g]."""
        taken = self.planes[:, :planes].transpose(1, 2) @ self.scales[:, :planes, None]
        return self.target - taken[..., 0]

    def greedy(self, bits: int) -> None:
        """`bits` planes one after the other, then least squares for all their scales."""
        for _ in range(bits):
            rest = self.left()
            size = (rest.abs() * self.importance).sum(1, keepdim=True)
            size = size / self.importance.sum(1, keepdim=True)
            self._append(rest, size)
        self.solve()

    def expand(self) -> None:
        """One more plane, the sign of the error, and least squares for all scales."""
        rest = self.left()
        self._append(rest, torch.zeros(len(rest), 1))
        self.solve()

    def solve(self) -> None:
        """Weighted least squares for all scales of the present planes."""
        weighted = self.planes * self.importance[:, None]
        gram = (weighted @ self.planes.transpose(1, 2)).double()
        right = (weighted @ self.target[..., None]).double()
        gram.diagonal(dim1=1, dim2=2).add_(RIDGE * self.importance.sum(1, dtype=torch.float64)[:, None])
        factor = torch.linalg.cholesky(gram)
        self.scales = torch.cholesky_solve(right, factor)[..., 0].float()

    def assign(self, bits: int) -> bool:
        """The nearest of all 2^bits levels for every entry; whether a sign changed."""
        signs = _signs(bits)
        levels = self.scales[:, self.offset :] @ signs
        if self.offset:
            levels = levels + self.scales[:, :1]
        levels, order = levels.sort(dim=1)
        borders = (levels[:, 1:] + levels[:, :-1]) / 2
        found = order.gather(1, torch.searchsorted(borders.contiguous(), self.target))
        return self._replace(slice(self.offset, None), signs[:, found].transpose(0, 1))

    def reassign_last(self) -> bool:
        """The last plane as the sign of what all others leave; whether a sign changed."""
        last = self.planes.shape[1] - 1
        return self._replace(slice(last, None), _sign(self.left(last))[:, None])

    def codes(self, bits: int) -> Tensor:
        """uint8 [C, g]: the planes as bits, the first the most significant."""
        weights = 2.0 ** torch.arange(bits - 1, -1, -1)
        ones = (self.planes[:, self.offset :] + 1) / 2
        return (ones * weights[:, None]).sum(1).to(torch.uint8)

    def take_better(self, other: Groups) -> None:
        """Each group as in `other` where its weighted error is less."""
        errors = [(fit.importance * fit.left().square()).sum(1, keepdim=True) for fit in (self, other)]
        less = errors[1] < errors[0]
        self.scales = torch.where(less, other.scales, self.scales)
        self.planes = torch.where(less[..., None], other.planes, self.planes)

    def _append(self, rest: Tensor, scale: Tensor) -> None:
        self.planes = torch.cat([self.planes, _sign(rest)[:, None]], 1)
        self.scales = torch.cat([self.scales, scale], 1)

    def _replace(self, where: slice, planes: Tensor) -> bool:
        changed = not torch.equal(self.planes[:, where], planes)
        self.planes[:, where] = planes
        return changed


def _sign(values: Tensor) -> Tensor:
    """+1 where values >= 0, else -1."""
    return (values >= 0).float() * 2 - 1


def _signs(bits: int) -> Tensor:
    """float32 [bits, 2^bits]: the signs of every code, most significant bit first."""
    codes, shifts = torch.arange(2**bits), torch.arange(bits - 1, -1, -1)
    return ((codes >> shifts[:, None]) & 1).float() * 2 - 1


def normalised(importance: Tensor, real: Tensor) -> Tensor:
    """Weights [1, G, g] with mean 1 over the real entries of each group; equal ones where a group's are all 0.

    They are rounded to multiples of g / 2^24, so that float32 sums of them with any signs are exact and the normal equations
    are positive definite whatever the spread.
    """
    mean = importance.sum(-1, keepdim=True) / real.sum(-1, keepdim=True)
    step = 2.0 ** (math.ceil(math.log2(importance.shape[-1])) - 24)
    each = torch.where(mean > 0, importance / mean.clamp_min(1e-30), real)
    return (each / step).round() * step
