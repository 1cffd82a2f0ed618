"""A weight for the integer kernels with everything that an oracle needs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from anybit.formats.decoder import groups
from anybit.formats.planes import pack
from anybit.kernels.linear_w_a8 import op, reference
from anybit.kernels.native import native


def every_machine() -> Iterator[tuple[str, int]]:
    """Each instruction set with one and two threads, in turn; everything as before afterwards."""
    module = native()
    assert module, "anybit._native is not built: the native kernels would go untested"
    before, threads = module.isa(), module.threads()
    for isa, count in itertools.product(module.available_isas(), (1, 2)):
        module.set_isa(isa), module.set_threads(count)
        yield isa, count
    module.set_isa(before), module.set_threads(threads)


class Case:
    """A random weight and activations over the full range of codes; extreme values are made sure of."""

    def __init__(self, bits: int, rows: int, columns: int, group: int, tokens: int) -> None:
        g = torch.Generator().manual_seed(bits * 131 + rows * 7919 + columns * 31 + tokens)
        table = (rows, groups(columns, group))
        self.codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=g)
        self.codes[0] = 2**bits - 1
        self.scale = (10.0 ** (torch.rand(table, generator=g) * 4 - 4)).half()
        self.zero = torch.randint(0, 2**bits, table, dtype=torch.uint8, generator=g)
        self.group, self.columns, self.bits = group, columns, bits
        self.planes = pack(self.codes, bits)
        if columns % 8:
            self.planes[:, :, -1] |= 0xFF << (columns % 8) & 0xFF  # poisoned padding must not matter
        self.weight = op.tile(self.planes, self.scale, self.zero, group, columns)
        x = torch.randn(tokens, columns, generator=g) * 10.0 ** (torch.rand(columns, generator=g) * 3 - 2)
        self.x = op.quantize(x, group)
        self.x.codes[-1, :columns] = -127
        self.x = replace(self.x, sums=_group_sums(self.x.codes[:, :columns], group))

    def integers(self) -> Tensor:
        return reference.sums(self.x.codes[:, : self.columns], self.codes, self.group)


def _group_sums(codes: Tensor, group: int) -> Tensor:
    return torch.stack([part.long().sum(1) for part in codes.split(group, dim=1)], dim=1).float()
