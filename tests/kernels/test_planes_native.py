"""Native pack and unpack equal the definition byte for byte: every width, instruction set and odd shape."""

from __future__ import annotations

import itertools

import pytest
import torch

from anybit.errors import FormatError, KernelUnavailable
from anybit.formats import planes as definition
from anybit.kernels.native import native, set_threads
from anybit.kernels.planes import op

ROWS = (1, 3, 17)
COLUMNS = (1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 67, 127, 130, 257)


def codes_of(bits: int, rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits * 1000 + columns)
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("bits", range(1, 9))
def test_equal_to_the_definition(isa, bits):
    for rows, columns in itertools.product(ROWS, COLUMNS):
        codes = codes_of(bits, rows, columns)
        planes = definition.pack(codes, bits)
        assert torch.equal(op.pack(codes, bits, impl="native"), planes), (rows, columns)
        assert torch.equal(op.unpack(planes, columns, impl="native"), codes), (rows, columns)


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_dirty_padding_does_not_matter(isa, bits):
    for columns in COLUMNS:
        codes = codes_of(bits, 5, columns)
        planes = definition.pack(codes, bits)
        if columns % 8:
            planes[..., -1] |= (0xFF << (columns % 8)) & 0xFF
        assert torch.equal(op.unpack(planes, columns, impl="native"), codes), columns


def test_threads_do_not_change_a_byte(isa):
    codes = codes_of(5, 301, 1031)
    results = []
    for threads in (1, 2, 5):
        set_threads(threads)
        planes = op.pack(codes, 5, impl="native")
        assert torch.equal(op.unpack(planes, 1031, impl="native"), codes)
        results.append(planes)
    assert torch.equal(results[0], definition.pack(codes, 5))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_views_are_read_where_they_are(isa):
    codes = codes_of(4, 40, 66)[::2, 1:]
    assert torch.equal(op.pack(codes, 4, impl="native"), definition.pack(codes.contiguous(), 4))


def test_wrong_input_is_refused():
    with pytest.raises(FormatError, match="does not fit 3 bits"):
        op.pack(torch.full((2, 3), 8, dtype=torch.uint8), 3)
    with pytest.raises(FormatError, match="2 bytes a row"):
        op.unpack(torch.zeros(2, 3, 1, dtype=torch.uint8), 9)
    with pytest.raises(KernelUnavailable, match="known: native, reference"):
        op.unpack(torch.zeros(2, 3, 1, dtype=torch.uint8), 8, impl="magic")
    with pytest.raises(KernelUnavailable, match="needs CPU tensors, got meta"):
        op.unpack(torch.zeros(2, 3, 1, dtype=torch.uint8, device="meta"), 8, impl="native")
    module = native()
    assert module
    with pytest.raises(ValueError, match="avx9 is unknown"):
        module.set_isa("avx9")
