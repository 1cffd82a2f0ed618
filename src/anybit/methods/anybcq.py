"""AnyBCQ (arXiv 2510.10467): nested binary-coded weights, W ~ offset + sum_{i<=p} alpha_i^(p) B_i with B_i in {-1, +1}.

Per row and group. The base precision starts greedily (offset = mean, then again and again B = sign of what is left, alpha =
its mean size) and alternates `iterations` times between least squares for its scales and the nearest level for every
weight. Each further bit keeps all planes, adds B_p = sign(W - What) and alternates between least squares for *all* scales
of the new precision and B_p = sign of what the other planes leave. So planes are shared and every precision has scales of
its own. The paper then trains the scales on the block's output (stage `compensate`, `tune_tables.py`).

That looks at weights, not at what the layer gives. With `weights` (ours) it is but the start, and `binary_solver.py` goes on:
planes by a column walk with error feedback for all precisions at once, scales by least squares through the whole Hessian, a
sweep of new planes, scales again. Precisions are solved for in two steps, up to 4 bits, then the rest.

weighting   "none": plain squared error, the paper's; "hessian": column k counts H_kk times (ours), and the base starts from
            the plain greedy planes as well as from the weighted ones; each group keeps the better.
weights     how much each precision counts, relative to 4^-bits as for `nested`; one for each of the precisions, or none: the
            paper's method. `refit` rounds of scales and planes; `damping`, `first_token_weight`, `stream` as for `nested`.
group_size  128 in the paper. Each precision stores p + 1 float16 numbers a group: for 2, 3, 4, 6 and 8 bits together 3.5
            bits a weight in groups of 128, 7 in groups of 64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from anybit.formats.binary_coded import BinaryCoded
from anybit.formats.decoder import Form, by_group
from anybit.formats.terms import CodeTerm, Term
from anybit.methods.base import InputStats, Method
from anybit.methods.binary_solver import Aim, solve_planes, stages

BLOCK_WEIGHTS = 1 << 16  # weights fitted at a time, so that their planes stay in the cache
RIDGE = 1e-7  # of the group's total weight: makes equal planes (a constant group) solvable, moves nothing else


class AnyBCQ(Method):
    """Options: `bits` stored, `base_bits`, `precisions` that get scales (None: all from base to stored), `group_size`
    (-1 = whole row), `offset` off for planes alone, `iterations` of the fit above, and those explained there."""

    name: ClassVar[str] = "anybcq"
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    rows_at_once: ClassVar[int | None] = 768
    bits: int = Field(default=4, ge=1, le=8)
    base_bits: int = Field(default=2, ge=1, le=8)
    precisions: tuple[int, ...] | None = None
    group_size: int = Field(default=128, ge=-1)
    offset: bool = True
    iterations: int = Field(default=20, ge=0)
    weighting: Literal["none", "hessian"] = "none"
    weights: dict[int, float] = Field(default_factory=dict)
    refit: int = Field(default=1, ge=0)
    damping: float = Field(default=0.05, gt=0, lt=1)
    stream: int | None = None
    first_token_weight: float = Field(default=1.0, ge=1)

    @model_validator(mode="after")
    def _base_to_stored(self) -> Self:
        scales = self.scales()
        if self.group_size == 0:
            raise ValueError("group_size must be at least 1, or -1 for one group a row")
        if not scales or list(scales) != sorted(set(scales)) or scales[0] < self.base_bits or scales[-1] != self.bits:
            raise ValueError(
                f"precisions must ascend from base_bits ({self.base_bits}) or more to bits ({self.bits}), got {list(scales)}"
            )
        if self.weights and (set(self.weights) != set(scales) or min(self.weights.values()) <= 0):
            raise ValueError(
                f"weights must be positive and one for each of the precisions {list(scales)}, or none at all"
            )
        if self.stream not in (None, *scales):
            raise ValueError(f"stream must be one of the precisions {list(scales)}")
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
        columns, size = weight.shape[1], self._columns_per_group(weight.shape[1])
        importance = torch.ones(columns)
        if self.weighting == "hessian" and stats.hessian is not None:
            importance = stats.hessian.diagonal()
        each = normalised(by_group(importance[None], size), by_group(torch.ones(1, columns), size))
        if not self.weights:
            return [CodeTerm.from_codes(*self._published(weight, each))]
        seen = stats.hessian if stats.hessian is not None and stats.tokens else torch.eye(columns)
        aims = [Aim(self.emphasis(widths), self.damping, self.refit) for widths in stages(self.scales())]
        first = [p for p in self.scales() if p in aims[0].emphasis]
        _, start = self.model_copy(update={"bits": first[-1], "precisions": tuple(first)})._published(weight, each)
        return [CodeTerm.from_codes(*solve_planes(weight, seen, start, aims))]

    def emphasis(self, widths: Sequence[int]) -> dict[int, float]:
        """lambda_p 4^p of `widths`, the largest 1."""
        scaled = {width: self.weights[width] * 4.0**width for width in widths}
        return {width: value / max(scaled.values()) for width, value in scaled.items()}

    def _published(self, weight: Tensor, each: Tensor) -> tuple[Tensor, BinaryCoded]:
        """Codes uint8 [N, K] and scales, each group for itself, with weights `each` [1, G, g]."""
        size = self._columns_per_group(weight.shape[1])
        step = max(1, BLOCK_WEIGHTS // weight.shape[1])
        parts = [self._fit(part, each.expand(len(part), -1, -1)) for part in by_group(weight, size).split(step)]
        codes = torch.cat([codes for codes, _ in parts]).view(len(weight), -1)[:, : weight.shape[1]].contiguous()
        tables = {
            p: torch.cat([scales[p] for _, scales in parts]).view(len(weight), each.shape[1], -1).to(torch.float16)
            for p in self.scales()
        }
        offsets = {p: table[..., 0].contiguous() for p, table in tables.items()} if self.offset else None
        alphas = {p: table[..., -p:].contiguous() for p, table in tables.items()}
        return codes, BinaryCoded(self.bits, size, alphas, offsets)

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
