"""QoQ's progressive weights (QServe, Lin et al., arXiv 2405.04532): int8 per row, then 4-bit codes inside each group of it.

Level 1: channel = max |row| / 119. Level 2, on weights in those units: an integer scale = round((max - min) / 15) and
zero = round(-min / scale), with 0 in the range. Weights are clamped to +-119 (the protective range), so that products of
codes stay within int8 (121 at most). Then GPTQ on the level-1 weights with both levels fixed.

clip      how ranges are shrunk, level by level: level 1 over `steps` ratios down to 0.2 by the loss of the whole row,
          level 2 per group. "output" (the paper): the error of the layer's output, from the group's own block of H;
          "hessian": from its diagonal, since GPTQ makes up for the rest; "none". Level 2 has integer scales 1..16, so
          instead of the paper's 80 ratios every integer from the one that covers the range down to a fifth is tried.
protect   119, the paper's range; fewer than 4 bits also need the clamp of codes in `two_level.rounded`.

Left out: the error of the attention block's output for query and key ranges (the paper's refinement; here they have the
layer's own error). group_size -1 is the paper's per-channel variant: one float scale and zero a row, which is the affine grid.

Defaults: the paper's groups of 128, damping 0.01, block 128, order by descending diagonal. `first_token_weight` as in GPTQ.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from anybit.formats.decoder import Form, by_group
from anybit.formats.terms import Term
from anybit.methods.base import InputStats
from anybit.methods.column_solver import prepare
from anybit.methods.gptq import GPTQ
from anybit.methods.two_level import (
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

LEAST = 0.2


class QoQ(TwoLevel):
    """Options: those explained above and GPTQ's `order`, `damping`, `block`."""

    name: ClassVar[str] = "qoq"
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    clip: Literal["none", "hessian", "output"] = "output"
    steps: int = Field(default=16, ge=0, le=80)
    protect: int = Field(default=119, ge=1, le=127)
    order: Literal["natural", "activation", "group"] = "activation"
    damping: float = Field(default=0.01, gt=0, lt=1)
    block: int = Field(default=128, ge=1)
    first_token_weight: float = Field(default=1.0, ge=1)

    def plan(self, shape: tuple[int, int]) -> Form:
        """One code term over all columns: dual-grained, or affine when a row is one group."""
        return self._per_channel().plan(shape) if self.group_size == -1 else super().plan(shape)

    def quantize(self, weight: Tensor, stats: InputStats) -> list[Term]:
        """One code term."""
        assert stats.hessian is not None
        if self.group_size == -1:
            return self._per_channel().quantize(weight, stats)
        weight, hessian = prepare(weight, stats.hessian)
        levels = self.fit(weight, hessian)
        return [levels.term(fed_back(levels, weight, hessian, self.order, self.damping, self.block))]

    def fit(self, weight: Tensor, hessian: Tensor) -> Levels:
        """Both levels for weight float32 [N, K] and H [K, K]."""
        blocks = group_blocks(hessian, self.columns_per_group(len(hessian)))
        if self.clip == "hessian":
            blocks = torch.diag_embed(blocks.diagonal(dim1=1, dim2=2))
        return joined([self._fit_rows(rows, blocks) for rows in row_blocks(weight)])

    @property
    def _top(self) -> int:
        return 2**self.bits - 1

    def _fit_rows(self, weight: Tensor, blocks: Tensor) -> Levels:
        parts = by_group(weight, blocks.shape[1])
        best = self._covering(parts, channel_scale(weight, 1.0, self.protect))
        if self.clip == "none":
            return best
        channel, least = best.channel, group_loss(best.errors(parts), blocks).sum(1, keepdim=True)
        for i in range(1, self.steps + 1):
            found = self._covering(parts, channel_scale(weight, 1 - (1 - LEAST) * i / self.steps, self.protect))
            loss = group_loss(found.errors(parts), blocks).sum(1, keepdim=True)
            channel, least = torch.where(loss < least, found.channel, channel), torch.minimum(loss, least)
        return self._clipped(parts, self._covering(parts, channel), blocks)

    def _covering(self, parts: Tensor, channel: Tensor) -> Levels:
        """Level 2 over the whole range of each group."""
        low, high = self._range(parts, channel)
        scale = ((high - low) / self._top).round().clamp_min(1)
        zero = (-low / scale).round().clamp(0, self._top)
        return Levels(self.bits, parts.shape[2], self.protect, channel, scale, zero)

    def _clipped(self, parts: Tensor, best: Levels, blocks: Tensor) -> Levels:
        """Level 2 of every group with the integer scale that loses least; both ends of its range shrink alike."""
        low, high = self._range(parts, best.channel)
        widest, least = ((high - low) / self._top).ceil().clamp_min(1), group_loss(best.errors(parts), blocks)
        for less in range(int(widest.max() * (1 - LEAST)) + 1):
            scale = torch.maximum(widest - less, (widest * LEAST).ceil())
            for zero in self.near(-low * torch.minimum(1 / scale, self._top / (high - low))):
                loss = group_loss(replace(best, scale=scale, zero=zero).errors(parts), blocks)
                better = loss < least
                best = replace(
                    best, scale=torch.where(better, scale, best.scale), zero=torch.where(better, zero, best.zero)
                )
                least = torch.minimum(loss, least)
        return best

    def _range(self, parts: Tensor, channel: Tensor) -> tuple[Tensor, Tensor]:
        low, high = spans(parts / channel[..., None])
        return low.clamp_min(-self.protect), high.clamp_max(self.protect)

    def _per_channel(self) -> GPTQ:
        clip: Literal["none", "hessian"] = "none" if self.clip == "none" else "hessian"
        same = {name: getattr(self, name) for name in ("bits", "group_size", "order", "damping", "block")}
        return GPTQ(clip=clip, first_token_weight=self.first_token_weight, **same)
