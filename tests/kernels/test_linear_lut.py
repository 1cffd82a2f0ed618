"""linear_lut is lossless: equal to plain int64 arithmetic on every instruction set, width, group, odd shape, thread count."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from anybit.errors import FormatError, KernelUnavailable
from anybit.formats.planes import pack
from anybit.kernels.linear_bits import op as bits_op
from anybit.kernels.linear_bits.encoding import Encoding, bipolar, ternary, twos_complement, unsigned
from anybit.kernels.linear_bits.weight import CodedWeight
from anybit.kernels.linear_lut import op
from anybit.kernels.native import set_threads

SIZES = (1, 3, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257, 576)


class Case:
    """Random unsigned codes and full-range int8 activations; `oracle` is an int64 sum of products."""

    def __init__(self, bits: int, tokens: int, rows: int, columns: int, group: int) -> None:
        g = torch.Generator().manual_seed(bits * 7 + rows * 7919 + columns)
        self.codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=g)
        self.x = torch.randint(-128, 128, (tokens, columns), dtype=torch.int8, generator=g)
        table = (rows, -(-columns // group))
        self.scale = torch.rand(table, generator=g) + 0.5
        self.x_scale = torch.rand(tokens, generator=g) + 0.5
        self.offset = torch.randint(-300, 300, table, dtype=torch.int32, generator=g)
        planes = pack(self.codes, bits)
        self.source = CodedWeight.of(planes, columns, unsigned(bits), group, self.scale, self.offset)
        self.weight = op.prepare(self.source)
        self.values = self.codes.long() + self.offset.repeat_interleave(group, 1)[:, :columns]

    def oracle(self) -> Tensor:
        group = self.weight.group_size
        parts = zip(self.x.long().split(group, 1), self.values.split(group, 1), strict=True)
        return torch.stack([(a[:, None] * b).sum(-1) for a, b in parts], -1)


@pytest.mark.parametrize("bits", range(1, 5))
def test_integers_equal_int64(isa, bits):
    shapes = [*zip(SIZES, SIZES[5:] + SIZES[:5], strict=True), *zip(SIZES, reversed(SIZES), strict=True)]
    cases = itertools.product((1, 2, 3), shapes, (32, 64, 96, 10**9))
    for number, (tokens, (rows, columns), group) in enumerate(cases):
        set_threads(1 + number % 2)
        case = Case(bits, tokens, rows, columns, min(group, columns))
        found = op.integers(case.x, case.weight, impl="native")
        assert torch.equal(found.long(), case.oracle()), (tokens, rows, columns, group)


@pytest.mark.parametrize("group", [32, 64, 96, 512, 1600])
def test_floats_equal_the_reference_and_linear_bits(isa, group):
    for bits in range(1, 5):
        case = Case(bits, 5, 83, 1600, group)
        y = op.linear(case.x, case.x_scale, case.weight, impl="native")
        assert torch.equal(y, op.linear(case.x, case.x_scale, case.weight, impl="reference"))
        terms = case.oracle() * (case.scale * case.x_scale[:, None, None]).double()
        # Each term is rounded as an integer and as a scale, and by every later addition: u = 2^-24 each.
        bound = 1.001 * (terms.shape[-1] + 2) * 2.0**-24 * terms.abs().sum(-1)
        assert bool(((y.double() - terms.sum(-1)).abs() <= bound).all())
        if group % 64 == 0:
            other = bits_op.prepare(case.source)
            assert torch.equal(bits_op.linear(case.x, case.x_scale, other, twos_complement(8)), y)


@pytest.mark.parametrize("bits", range(1, 5))
@pytest.mark.parametrize(("code", "x"), [(0, -128), (0, 127), (1, -128), (1, 127)])
def test_extremes_are_exact(isa, bits, code, x):
    columns = 33024
    planes = torch.full((bits, 18, columns // 8), 255 * code, dtype=torch.uint8)
    for encoding in (unsigned(bits), twos_complement(bits), bipolar(bits), unsigned(bits, 2**bits - 1)):
        weight = op.prepare(CodedWeight.of(planes, columns, encoding))
        value = encoding.offset + code * sum(encoding.coefficients)
        found = op.integers(torch.full((3, columns), x, dtype=torch.int8), weight, impl="native")
        assert found.unique().tolist() == [columns * value * x]


def test_alternating_extremes_do_not_carry_between_bytes(isa):
    x = torch.tensor([127, -128, 127, -128, -128, 127, 127, 127] * 144, dtype=torch.int8)[None]
    codes = torch.arange(37 * 1152, dtype=torch.int64).mul(2654435761).bitwise_right_shift(7).bitwise_and(15)
    codes = codes.to(torch.uint8).view(37, 1152)
    weight = op.prepare(CodedWeight.of(pack(codes, 4), 1152, unsigned(4)))
    assert torch.equal(op.integers(x, weight, impl="native")[..., 0].long(), x.long() @ codes.long().T)


def test_any_small_coefficient_per_plane(isa):
    g = torch.Generator().manual_seed(5)
    codes = torch.randint(0, 4, (50, 300), dtype=torch.uint8, generator=g)
    x = torch.randint(-128, 128, (4, 300), dtype=torch.int8, generator=g)
    for encoding, values in ((ternary(), [0, -1, 1, 0]), (Encoding((-127, 126), 5), [5, 131, -122, 4])):
        weight = op.prepare(CodedWeight.of(pack(codes, 2), 300, encoding))
        expected = x.long() @ torch.tensor(values)[codes.long()].T
        assert torch.equal(op.integers(x, weight, impl="native")[..., 0].long(), expected)


def test_columns_may_be_permuted_on_both_sides_only(isa):
    case = Case(3, 2, 40, 257, 257)
    order = torch.randperm(257, generator=torch.Generator().manual_seed(1))
    moved = op.prepare(replace(case.source, planes=pack(case.codes[:, order], 3)))
    assert torch.equal(op.integers(case.x[:, order], moved), op.integers(case.x, case.weight))
    assert not torch.equal(op.integers(case.x, moved), op.integers(case.x, case.weight))


def test_repack_is_reversible_and_padding_is_ignored(isa):
    for rows, columns in itertools.product((1, 15, 16, 17), (1, 7, 8, 31, 33, 513)):
        case = Case(4, 2, rows, columns, columns)
        back = op.unprepare(case.weight)
        for name in ("planes", "scale", "offset"):
            assert torch.equal(getattr(back, name), getattr(case.source, name)), name
        dirty = case.source.planes.clone()
        if columns % 8:
            dirty[..., -1] |= (0xFF << columns % 8) & 0xFF
        assert torch.equal(op.prepare(replace(case.source, planes=dirty)).lines, case.weight.lines)


def test_bits_of_padding_columns_do_not_matter(isa):
    case = Case(3, 2, 16, 33, 33)
    expected = op.integers(case.x, case.weight)
    case.weight.lines[:, -1, :, 1:] = 255  # byte 0 of the last chunk holds column 32
    assert torch.equal(op.integers(case.x, case.weight), expected)


def test_result_depends_on_neither_batch_nor_threads(isa):
    case = Case(2, 9, 531, 1024, 128)
    together = op.linear(case.x, case.x_scale, case.weight)
    for threads in (1, 2, 5):
        set_threads(threads)
        assert torch.equal(op.linear(case.x, case.x_scale, case.weight), together)
        rows = zip(case.x, case.x_scale, strict=True)
        alone = [op.linear(x[None], scale[None], case.weight) for x, scale in rows]
        assert torch.equal(torch.cat(alone), together), threads


def test_views_empty_batch_and_compiled_graph():
    case = Case(4, 3, 24, 128, 64)
    expected = op.linear(case.x, case.x_scale, case.weight)
    wide = torch.stack([case.x, case.x + 1], -1)[..., 0]
    assert torch.equal(op.linear(wide, torch.stack([case.x_scale] * 2, 1)[:, 0], case.weight), expected)
    assert op.linear(case.x[:0], case.x_scale[:0], case.weight).shape == (0, 24)
    compiled = torch.compile(lambda x, s: op.linear(x, s * 2, case.weight) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(case.x, case.x_scale), op.linear(case.x, case.x_scale * 2, case.weight) + 1)
    w = case.weight
    args = (case.x, case.x_scale, w.lines, w.coefficients, w.scale, w.offset, [8, 4, 2, 1], 24, 128, 64, w.reach)
    torch.library.opcheck(op.linear_op, args, test_utils=("test_schema", "test_faketensor"))


def test_wrong_input_is_refused():
    case = Case(4, 2, 8, 128, 64)
    with pytest.raises(FormatError, match="multiple of 32 columns or whole rows, got group_size=48"):
        op.prepare(CodedWeight.of(case.source.planes, 128, unsigned(4), 48))
    with pytest.raises(FormatError, match=r"takes 1 to 4 planes .* use linear_bits"):
        op.prepare(CodedWeight.of(torch.zeros(5, 8, 16, dtype=torch.uint8), 128, unsigned(5)))
    with pytest.raises(FormatError, match=r"within \+-127"):
        op.prepare(CodedWeight.of(case.source.planes, 128, Encoding((128, 1, 1, 1))))
    with pytest.raises(FormatError, match=r"takes int8 activations, got torch\.uint8"):
        op.linear(case.x.to(torch.uint8), case.x_scale, case.weight)
    with pytest.raises(KernelUnavailable, match="no implementation 'cuda'; known: native, reference"):
        op.integers(case.x, case.weight, impl="cuda")
    with pytest.raises(KernelUnavailable, match="needs CPU tensors, got meta"):
        op.integers(case.x.to("meta"), case.weight, impl="native")
