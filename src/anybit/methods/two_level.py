"""Two-level weights, what QoQ and DGQ share: value = channel[n] * (scale[n, g] * (code - zero[n, g])), integers inside.

Level 1 is one float scale per output row, in whose units a weight is within -127..127; level 2 an integer scale and zero
per group of columns. Both methods choose the two levels first and codes last; here is how codes are rounded, what a choice
costs, and how the result is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from anybit.formats.decoder import Form, groups
from anybit.formats.dual_grained import DualGrained
from anybit.formats.terms import CodeTerm, Term
from anybit.methods.column_solver import factor, solve
from anybit.methods.gptq import block_stops, column_order
from anybit.methods.grid import Grouped

INT8 = 127
SMALLEST = 2.0**-24  # of float16: a row of zeros still has a scale
BLOCK_WEIGHTS = 1 << 17


class TwoLevel(Grouped):
    """Options and form of both: `bits` of a code, `group_size` columns a group (-1: one group a row), and `zeros`: how far
    from the zero that fits the range others are tried (beyond the papers, which have 0)."""

    bits: int = Field(default=4, ge=2, le=8)
    group_size: int = Field(default=128, ge=-1)
    zeros: int = Field(default=0, ge=0, le=7)

    def plan(self, shape: tuple[int, int]) -> Form:
        """One dual-grained code term over all columns."""
        part = {"kind": "dual_grained", "bits": self.bits, "group_size": self.columns_per_group(shape[1])}
        return {"shape": list(shape), "terms": [{"term": "code", "columns": [0, shape[1]], **part}]}

    def near(self, zero: Tensor) -> Iterator[Tensor]:
        """Integer zeros to try for the real one of a range, float32 [N, G]."""
        for offset in range(-self.zeros, self.zeros + 1):
            yield (zero.round() + offset).clamp(0, 2**self.bits - 1)


@dataclass(frozen=True)
class Levels:
    """The two levels of rows of weights, all float32.

    Attributes:
        bits: of a code.
        group_size: columns per group.
        limit: magnitude that weights are clamped to in units of `channel`: 127, or less to protect int8 (QoQ).
        channel: [N, 1], numbers of float16, positive.
        scale: [N, G], integers 1..127.
        zero: [N, G], integers 0..2^bits - 1.
    """

    bits: int
    group_size: int
    limit: int
    channel: Tensor
    scale: Tensor
    zero: Tensor

    def codes(self, parts: Tensor) -> Tensor:
        """Weights by group [N, G, group_size] to the nearest codes, float32 [N, G, group_size]."""
        scale, zero = self.scale[..., None], self.zero[..., None]
        return rounded(parts / self.channel[..., None], scale, zero, self.bits, self.limit)

    def errors(self, parts: Tensor) -> Tensor:
        """What rounding adds to weights by group [N, G, group_size], same shape; 0 in columns beyond K, which hold 0."""
        steps = self.codes(parts) - self.zero[..., None]
        return steps.mul_((self.scale * self.channel)[..., None]).sub_(parts)

    def term(self, codes: Tensor) -> Term:
        """The code term of codes [N, K]."""
        scale, zero = (x.to(torch.uint8) for x in (self.scale, self.zero))
        decoder = DualGrained(self.bits, self.group_size, self.channel.half(), scale, zero)
        return CodeTerm.from_codes(codes.to(torch.uint8), decoder)


def rounded(values: Tensor, scale: Tensor, zero: Tensor, bits: int, limit: int) -> Tensor:
    """Codes, float32, of `values` in units of level 1; all arguments of one shape or broadcast to it.

    No code is emitted whose product scale * (code - zero) leaves -127..127. With values within 119 and scales of at most 16
    (4 bits) rounding alone sees to that: it overshoots to 121 at worst; 120 would reach 128.
    """
    most = (INT8 / scale).floor()
    lowest, highest = torch.maximum(-most, -zero), torch.minimum(most, 2**bits - 1 - zero)
    return (values.clamp(-limit, limit) / scale).round().clamp(lowest, highest) + zero


def channel_scale(weight: Tensor, ratio: float, limit: int) -> Tensor:
    """Level 1 for weight [N, K]: `ratio` of the largest magnitude is `limit`, float32 [N, 1] of float16 numbers."""
    return (weight.abs().amax(1, keepdim=True) * (ratio / limit)).clamp_min(SMALLEST).half().float()


def spans(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest weight [N, G] of weights by group [N, G, group_size], 0 included, never both 0."""
    low, high = parts.amin(-1).clamp_max(0), parts.amax(-1).clamp_min(0)
    return low, torch.where(low == high, SMALLEST, high)


def group_blocks(hessian: Tensor, group_size: int) -> Tensor:
    """The blocks on the diagonal of H [K, K], [G, group_size, group_size], 0 beyond K."""
    count = groups(len(hessian), group_size)
    out = torch.zeros(count, group_size, group_size)
    for g in range(count):
        run = slice(g * group_size, min((g + 1) * group_size, len(hessian)))
        out[g, : run.stop - run.start, : run.stop - run.start] = hessian[run, run]
    return out


def group_loss(errors: Tensor, blocks: Tensor) -> Tensor:
    """What the errors of a group do to the outputs on their own: d_g H_gg d_g^T for d [N, G, group_size], [N, G]."""
    parts = errors.transpose(0, 1)
    return (torch.bmm(parts, blocks) * parts).sum(-1).t()


def row_blocks(weight: Tensor) -> Iterator[Tensor]:
    """Rows of weight [N, K] a few at a time, so that a search goes over data that stays in the cache."""
    return iter(weight.split(max(1, BLOCK_WEIGHTS // weight.shape[1])))


def joined(parts: list[Levels]) -> Levels:
    """The levels of the rows of all parts."""
    tables = [torch.cat([getattr(part, name) for part in parts]) for name in ("channel", "scale", "zero")]
    return Levels(parts[0].bits, parts[0].group_size, parts[0].limit, *tables)


def fed_back(levels: Levels, weight: Tensor, hessian: Tensor, order: str, damping: float, block: int) -> Tensor:
    """Codes uint8 [N, K] of weight float32 [N, K] by GPTQ's walk with both levels fixed: each column's error goes to the columns
    still to come. H [K, K] without dead inputs (`column_solver.prepare`); `order`, `damping` and `block` as in GPTQ."""
    columns = column_order(order, hessian.diagonal(), levels.group_size)
    walk = _Walk(levels, (columns // levels.group_size).tolist())
    upper, _ = factor(hessian[columns][:, columns], damping)
    stops = block_stops(walk.group, block, whole_groups=False)
    codes, _ = solve((weight / levels.channel)[:, columns], upper, walk.quantize, stops)
    natural = torch.empty_like(codes)
    natural[:, columns] = codes
    return natural


class _Walk:
    """The levels of each column's group in solver order; `group` by solver column."""

    def __init__(self, levels: Levels, group: list[int]) -> None:
        self.group, self._levels = group, levels
        self._scale, self._zero = levels.scale.t().contiguous(), levels.zero.t().contiguous()

    def quantize(self, rest: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """A `column_solver.Quantizer` of weights in units of level 1."""
        scale, zero = self._scale[self.group[i]], self._zero[self.group[i]]
        codes = rounded(rest[i], scale, zero, self._levels.bits, self._levels.limit)
        return codes.to(torch.uint8), (codes - zero) * scale
