"""The choice of one code for several widths at once, a column at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from anybit.formats.nested_affine import NestedAffine


class Levels:
    """The L widths that count (ascending), each with its emphasis and its grid, ready to be used column by column.

    `group` int64 [K] says which group the i-th column visited belongs to. A width below the narrowest needs no entry; the
    widest must be the stored width or the codes below it take the middle of their cell.
    """

    def __init__(self, grid: NestedAffine, emphasis: Mapping[int, float], group: Tensor) -> None:
        self.bits, self.widths, self.group = grid.bits, tuple(sorted(emphasis)), group.tolist()
        self._emphasis = [emphasis[width] for width in self.widths]
        tables = [grid.grid(width) for width in self.widths]
        self._scale = torch.stack([scale.float().t() for scale, _ in tables], 1)  # [G, L, N]
        self._zero = torch.stack([zero.float().t() for _, zero in tables], 1)

    def choose(self, targets: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """For targets float32 [L, N] of the i-th column: the codes uint8 [N] with the least sum of emphasis * (target -
        value)^2, the lowest of several, and their values float32 [L, N].

        Exact: every cell of the last width but one is tried, and within a cell the widest takes its nearest code.
        """
        scale, zero = self._scale[self.group[i]], self._zero[self.group[i]]
        narrow, widest = self.widths[:-1], self.widths[-1]
        cells = 2 ** (narrow[-1] if narrow else 0)
        cost = torch.zeros(cells, targets.shape[1])
        for level, width in enumerate(narrow):
            lost = (targets[level] - (_middles(width, self.bits)[:, None] - zero[level]) * scale[level]).square_()
            cost += lost.mul_(self._emphasis[level]).repeat_interleave(cells >> width, 0)
        step = 2 ** (self.bits - widest)
        inside = 2**widest // cells
        first = (torch.arange(cells) * inside)[:, None].float()
        shift = (step - 1) / 2
        index = ((targets[-1] / scale[-1] + ((zero[-1] - shift) % step)) / step).round_()
        index = index + torch.div(zero[-1] - shift, step, rounding_mode="floor")
        index = index.maximum(first).minimum(first + (inside - 1))
        lost = (targets[-1] - (index * step + shift - zero[-1]) * scale[-1]).square_()
        best = cost.add_(lost, alpha=self._emphasis[-1]).argmin(0, keepdim=True)
        codes = index.gather(0, best)[0] * step
        return codes.to(torch.uint8), self.values(codes, i)

    def values(self, codes: Tensor, i: int) -> Tensor:
        """Values float32 [L, N] of codes [N] of the i-th column."""
        scale, zero = self._scale[self.group[i]], self._zero[self.group[i]]
        steps = torch.tensor([2.0 ** (self.bits - width) for width in self.widths])[:, None]
        return ((codes.float() / steps).floor_() * steps + (steps - 1) / 2 - zero) * scale

    def quantize(self, rest: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """A `column_solver.Quantizer` over rows [L * N] (a target for every width) or [N] (one for all: the mean)."""
        count = self._scale.shape[2]
        targets = rest[i].view(-1, count)
        codes, values = self.choose(targets.expand(len(self.widths), -1), i)
        if len(targets) == 1:
            return codes, values.mean(0)
        return codes.repeat(len(self.widths)), values.reshape(-1)


def _middles(width: int, bits: int) -> Tensor:
    """The middle of every cell of `width` bits, in steps of the stored codes: float32 [2^width]."""
    step = 2 ** (bits - width)
    return torch.arange(2**width) * float(step) + (step - 1) / 2
