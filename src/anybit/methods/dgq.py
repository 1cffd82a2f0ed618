"""DGQ, dual-grained weights (Zhang et al., arXiv 2310.04836): a two-phase search of scales by the error of the output.

Phase 1, group by group: of `group_steps` shrunken ranges (1.009 .. 0.80 of min and max) the float scale s' and zero with the
least error of the group's own output. Phase 2, row by row: of `channel_steps` channel scales (1.00975 .. 0.20 of max |row| /
127) the one with the least error of the row's output, where scale = round(s' / channel), at least 1, at most `most`. Small
channel scales render s' finely and clip large weights; the search weighs the two. Codes are nearest, and clamped where a
product would leave int8 (`two_level.rounded`).

Differs from the paper's code: both errors come from H = 2/T X^T X of all calibration tokens (the code uses the last sample
only); the plain range (ratio 1) is a candidate too, so that no step loses against rounding; ranges include 0 (zeros are
stored in 0..2^bits - 1). No steps at all is two-level round-to-nearest.

`damping`, beyond the paper (0), adds that share of mean(diag H) to the diagonal: where one token outweighs all others, H knows
one direction only, and rounding pays for it in every other. `first_token_weight` as in GPTQ, 1 in the paper. `feedback`,
beyond the paper (which rounds to nearest), gives codes by GPTQ's walk over the columns, both levels as the search left them.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from anybit.formats.decoder import by_group
from anybit.formats.terms import Term
from anybit.methods.base import InputStats
from anybit.methods.column_solver import prepare
from anybit.methods.two_level import (
    INT8,
    Levels,
    TwoLevel,
    channel_scale,
    fed_back,
    group_blocks,
    group_loss,
    joined,
    row_blocks,
    spans,
)

WIDEST = 1.02
GROUP_LEAST, CHANNEL_LEAST = 0.80, 0.20
LEAST_DAMPING, BLOCK = 0.01, 128  # GPTQ's, for the walk


class DGQ(TwoLevel):
    """Options as explained above; most 127 (the paper), 16 where a kernel multiplies packed bytes."""

    name: ClassVar[str] = "dgq"
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    rows_at_once: ClassVar[int | None] = 256
    group_steps: int = Field(default=20, ge=0)
    channel_steps: int = Field(default=80, ge=0)
    most: int = Field(default=INT8, ge=1, le=INT8)
    damping: float = Field(default=0.0, ge=0, lt=1)
    first_token_weight: float = Field(default=1.0, ge=1)
    feedback: bool = False

    def quantize(self, weight: Tensor, stats: InputStats) -> list[Term]:
        """One dual-grained code term."""
        assert stats.hessian is not None
        weight, hessian = prepare(weight, stats.hessian)
        levels = self.fit(weight, hessian)
        if self.feedback:
            damping = max(self.damping, LEAST_DAMPING)
            return [levels.term(fed_back(levels, weight, hessian, "activation", damping, BLOCK))]
        codes = levels.codes(by_group(weight, levels.group_size))
        return [levels.term(codes.flatten(1)[:, : weight.shape[1]])]

    def fit(self, weight: Tensor, hessian: Tensor) -> Levels:
        """Both levels for weight float32 [N, K] and H [K, K]."""
        hessian = hessian + self.damping * hessian.diagonal().mean() * torch.eye(len(hessian))
        blocks = group_blocks(hessian, self.columns_per_group(len(hessian)))
        return joined([self._fit_rows(rows, blocks, hessian) for rows in row_blocks(weight)])

    def _fit_rows(self, weight: Tensor, blocks: Tensor, hessian: Tensor) -> Levels:
        """Phase 2 after phase 1."""
        parts = by_group(weight, blocks.shape[1])
        step, zero = self.groups(parts, blocks)

        def levels(channel: Tensor) -> Levels:
            scale = (step / channel).round().clamp(1, self.most)
            return Levels(self.bits, parts.shape[2], INT8, channel, scale, zero)

        best = channel_scale(weight, 1.0, INT8)
        least = torch.full_like(best, torch.inf)
        for ratio in _ratios(self.channel_steps, CHANNEL_LEAST):
            channel = channel_scale(weight, ratio, INT8)
            errors = levels(channel).errors(parts).flatten(1)[:, : weight.shape[1]]
            loss = ((errors @ hessian) * errors).sum(1, keepdim=True)
            best, least = torch.where(loss < least, channel, best), torch.minimum(loss, least)
        return levels(best)

    def groups(self, parts: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Phase 1: float scales and integer zeros [N, G] for weights by group [N, G, group_size]; `blocks` as of
        `group_blocks`."""
        low, high = spans(parts)
        top = 2**self.bits - 1
        best, middle, least = torch.zeros_like(low), torch.zeros_like(low), torch.full_like(low, torch.inf)
        for ratio in _ratios(self.group_steps, GROUP_LEAST):
            scale = ratio * (high - low) / top
            for zero in self.near(-ratio * low / scale):
                steps = (parts / scale[..., None]).round().clamp(-zero[..., None], top - zero[..., None])
                loss = group_loss(steps * scale[..., None] - parts, blocks)
                better = loss < least
                best, middle = torch.where(better, scale, best), torch.where(better, zero, middle)
                least = torch.minimum(loss, least)
        return best, middle


def _ratios(steps: int, least: float) -> list[float]:
    """1, and `steps` ratios from just below `WIDEST` down to `least`."""
    return [1.0, *(WIDEST - (WIDEST - least) * i / steps for i in range(1, steps + 1))]
