"""Every integer kernel x instruction set x bits x group x K x N x tokens x threads equals int64 arithmetic.

A few sizes by default (the kernels' own tests let N and tokens go round); all of them with ANYBIT_TEST_GRID=full, which
takes about a quarter of an hour. One weight serves all N and all tokens: rows and tokens do not depend on each other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

from anybit.formats.planes import pack
from anybit.kernels.linear_bits import op as linear_bits
from anybit.kernels.linear_bits.encoding import twos_complement, unsigned
from anybit.kernels.linear_bits.weight import CodedWeight
from anybit.kernels.linear_lut import op as linear_lut
from anybit.kernels.linear_w_a8 import op as linear_w_a8
from integer_case import Case, every_machine

FULL = os.environ.get("ANYBIT_TEST_GRID") == "full"
SIZES = (1, 3, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257, 576, 1536, 2688, 14464) if FULL else (1, 33, 129)
GROUPS = (32, 64, 128)
MANY_TOKENS = (1, 2, 3, 4, 7, 9, 16, 21, 37, 70) if FULL else (2, 9, 16)
FEW_TOKENS = (1, 2, 3, 5)
LARGEST = 1 << 20
"""Cells of a weight: wide shapes keep the rows that fit."""

Prepare = Callable[[int], Callable[[int], Tensor]]
"""Rows to (tokens to integers [T, G, N])."""
Subject = tuple[Tensor, tuple[int, ...], Prepare]
"""The expected int64 [T, G, N], the token counts to try, and the kernel."""


def rows_for(columns: int) -> list[int]:
    return [rows for rows in SIZES if rows * columns <= LARGEST]


def w_a8(bits: int, columns: int, group: int) -> Iterator[Subject]:
    case = Case(bits, max(rows_for(columns)), columns, group, max(MANY_TOKENS))

    def prepare(rows: int) -> Callable[[int], Tensor]:
        table = (case.planes[:, :rows].contiguous(), case.scale[:rows].contiguous(), case.zero[:rows].contiguous())
        weight = linear_w_a8.tile(*table, group, columns)
        x = case.x
        return lambda n: linear_w_a8.sums(linear_w_a8.Quantized(x.codes[:n], x.scale[:n], x.sums[:n]), weight)

    yield case.integers(), MANY_TOKENS, prepare


def random_weight(bits: int, columns: int, group: int) -> tuple[Callable[[int], CodedWeight], Tensor]:
    """The first rows of a weight, and what all of its codes mean, int64 [N, K]."""
    g = torch.Generator().manual_seed(bits * 131 + columns * 31 + group)
    codes = torch.randint(0, 1 << bits, (max(rows_for(columns)), columns), dtype=torch.uint8, generator=g)
    table = (len(codes), -(-columns // group))
    scale, offset = torch.rand(table, generator=g), torch.randint(-300, 300, table, dtype=torch.int32, generator=g)

    def first(rows: int) -> CodedWeight:
        return CodedWeight.of(pack(codes[:rows], bits), columns, unsigned(bits), group, scale[:rows], offset[:rows])

    return first, codes.long() + offset.long().repeat_interleave(group, 1)[:, :columns]


def expected(x: Tensor, values: Tensor, group: int) -> Tensor:
    parts = zip(x.long().split(group, 1), values.split(group, 1), strict=True)
    return torch.stack([a @ b.T for a, b in parts], 1)


def bits_serial(bits: int, columns: int, group: int) -> Iterator[Subject]:
    if group % 64 and group < columns:
        return  # not a shape of this kernel
    first, values = random_weight(bits, columns, group)
    for width in (1, 4, 8) if FULL else (3,):
        g = torch.Generator().manual_seed(width)
        x = torch.randint(-(1 << width - 1), 1 << width - 1, (max(FEW_TOKENS), columns), dtype=torch.int8, generator=g)

        def prepare(rows: int, x: Tensor = x, width: int = width) -> Callable[[int], Tensor]:
            weight, encoding = linear_bits.prepare(first(rows)), twos_complement(width)
            return lambda n: linear_bits.integers(x[:n], weight, encoding, impl="native").transpose(1, 2)

        yield expected(x, values, group), FEW_TOKENS, prepare


def lut(bits: int, columns: int, group: int) -> Iterator[Subject]:
    first, values = random_weight(bits, columns, group)
    g = torch.Generator().manual_seed(columns)
    x = torch.randint(-128, 128, (max(FEW_TOKENS), columns), dtype=torch.int8, generator=g)

    def prepare(rows: int) -> Callable[[int], Tensor]:
        weight = linear_lut.prepare(first(rows))
        return lambda n: linear_lut.integers(x[:n], weight, impl="native").transpose(1, 2)

    yield expected(x, values, group), FEW_TOKENS, prepare


KERNELS = [(w_a8, bits) for bits in range(1, 9)] + [(bits_serial, bits) for bits in range(1, 9)]
KERNELS += [(lut, bits) for bits in range(1, 5)]


@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize(("kernel", "bits"), KERNELS, ids=lambda value: getattr(value, "__name__", value))
def test_integers_equal_int64(kernel, bits, columns):
    count = 0
    for group in dict.fromkeys(min(g, columns) for g in (*GROUPS, columns)):
        for wanted, tokens, prepare in kernel(bits, columns, group):
            narrow = wanted.to(torch.int32)
            assert torch.equal(narrow.long(), wanted)
            for machine, rows in product(every_machine(), rows_for(columns)):
                run = prepare(rows)
                for n in tokens:
                    assert torch.equal(run(n), narrow[:n, :, :rows]), (*machine, group, rows, n)
                    count += 1
    print(f"{count} combinations")  # pytest -rP shows it
