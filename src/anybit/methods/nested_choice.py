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
        self._emphasis = torch.tensor([emphasis[width] for width in self.widths])
        self._steps = [2 ** (grid.bits - width) for width in self.widths]
        self._middles = [torch.arange(0, 2**grid.bits, step)[:, None] + (step - 1) / 2 for step in self._steps]
        tables = [grid.grid(width) for width in self.widths]
        self._scale = torch.stack([scale.float().t() for scale, _ in tables], 1)  # [G, L, N]
        self._zero = torch.stack([zero.float().t() for _, zero in tables], 1)

    def choose(self, targets: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """For targets float32 [L, N] of the i-th column: the codes uint8 [N] with the least sum of emphasis * (target -
        value)^2, the lowest of several, and their values float32 [L, N].

        Exact: in every cell of the last width but one the widest takes its nearest code; then, width by width towards the
        narrowest, of the cells that share a wider cell the best goes on.
        """
        scale, zero = self._scale[self.group[i]], self._zero[self.group[i]]
        weight = scale.square() * self._emphasis[:, None]
        cells = 2 ** ([0, *self.widths])[-2]
        steps, shifts = self._steps[-1], (self._steps[-1] - 1) / 2
        shift = zero[-1] - shifts
        rounded = ((targets[-1] / scale[-1] + shift % steps) / steps).round_() + (shift / steps).floor_()
        inside = 2 ** self.widths[-1] // cells
        first = torch.arange(0, cells * inside, inside)[:, None].float()
        codes = rounded.maximum(first).minimum(first + (inside - 1)).mul_(steps)
        cost = (codes + shifts).sub_(targets[-1] / scale[-1] + zero[-1]).square_().mul_(weight[-1])
        for level in range(len(self.widths) - 2, -1, -1):
            while len(cost) > 2 ** self.widths[level]:
                codes, cost = _better_halves(codes, cost)
            cost += self._middles[level].sub(targets[level] / scale[level] + zero[level]).square_().mul_(weight[level])
        while len(cost) > 1:
            codes, cost = _better_halves(codes, cost)
        return codes[0].to(torch.uint8), self.values(codes[0], i)

    def values(self, codes: Tensor, i: int) -> Tensor:
        """Values float32 [L, N] of codes [N] of the i-th column."""
        scale, zero = self._scale[self.group[i]], self._zero[self.group[i]]
        steps = torch.tensor(self._steps)[:, None]
        return ((codes.float() / steps).floor_() * steps + (steps - 1) / 2 - zero) * scale

    def quantize(self, rest: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """A `column_solver.Quantizer` over rows [L * N] (a target for every width) or [N] (one for all: the mean)."""
        count = self._scale.shape[2]
        targets = rest[i].view(-1, count)
        codes, values = self.choose(targets.expand(len(self.widths), -1), i)
        if len(targets) == 1:
            return codes, values.mean(0)
        return codes.repeat(len(self.widths)), values.reshape(-1)


def _better_halves(codes: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
    """Of every two neighbours [2 C, N] the one that costs less, the first of equals: [C, N]."""
    right = cost[1::2] < cost[0::2]
    return torch.where(right, codes[1::2], codes[0::2]), torch.minimum(cost[1::2], cost[0::2])
