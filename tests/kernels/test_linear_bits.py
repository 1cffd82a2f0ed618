"""linear_bits equals plain int64 arithmetic on every instruction set, width, encoding, group, odd shape, thread count."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from anybit.errors import FormatError, KernelUnavailable
from anybit.formats.planes import pack
from anybit.kernels.linear_bits import op, reference
from anybit.kernels.linear_bits.encoding import Encoding, bipolar, ternary, twos_complement, unsigned
from anybit.kernels.linear_bits.weight import CodedWeight
from anybit.kernels.native import native, set_threads

SIZES = (1, 3, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257, 576)
KINDS = ("unsigned", "twos_complement", "bipolar")


def meaning(codes: Tensor, bits: int, kind: str) -> Tensor:
    """The definition of each encoding, without planes."""
    codes = codes.long() & ((1 << bits) - 1)
    if kind == "unsigned":
        return codes
    if kind == "twos_complement":
        return torch.where(codes >= 1 << (bits - 1), codes - (1 << bits), codes)
    return 2 * codes - ((1 << bits) - 1)


def encoding(bits: int, kind: str, zero: int = 0) -> Encoding:
    return {
        "unsigned": unsigned(bits, zero),
        "twos_complement": twos_complement(bits),
        "bipolar": bipolar(bits),
    }[kind]


class Case:
    """Random codes on both sides; `oracle` is an int64 sum of products of what they mean."""

    def __init__(
        self, p: int, q: int, tokens: int, rows: int, columns: int, group: int, kinds: tuple[str, str]
    ) -> None:
        g = torch.Generator().manual_seed(p * 7 + q * 101 + rows * 7919 + columns)
        self.codes = torch.randint(0, 1 << p, (rows, columns), dtype=torch.uint8, generator=g)
        x = torch.randint(0, 1 << q, (tokens, columns), dtype=torch.uint8, generator=g)
        table, self.zero = (rows, -(-columns // group)), 3 if kinds[1] == "unsigned" else 0
        self.scale = torch.rand(table, generator=g) + 0.5
        self.x_scale = torch.rand(tokens, generator=g) + 0.5
        self.offset = torch.randint(-300, 300, table, dtype=torch.int32, generator=g)
        source = encoding(p, kinds[0])
        self.source = CodedWeight.of(pack(self.codes, p), columns, source, group, self.scale, self.offset)
        self.weight = op.prepare(self.source)
        self.encoding = encoding(q, kinds[1], self.zero)
        self.x_values = meaning(x, q, kinds[1]) - self.zero
        self.x = self.x_values.to(torch.int8) if kinds[1] == "twos_complement" else x
        own = source.offset  # `offset` replaces it
        self.values = meaning(self.codes, p, kinds[0]) - own + self.offset.repeat_interleave(group, 1)[:, :columns]

    def oracle(self) -> Tensor:
        group = self.weight.group_size
        parts = zip(self.x_values.split(group, 1), self.values.split(group, 1), strict=True)
        return torch.stack([(a[:, None] * b).sum(-1) for a, b in parts], -1)


@pytest.mark.parametrize("p", range(1, 9))
def test_integers_equal_int64(isa, p):
    shapes = [(rows, columns) for rows, columns in zip(SIZES, SIZES[5:] + SIZES[:5], strict=True)]
    cases = itertools.product(range(1, 9), shapes, (64, 128, 192, 10**9))
    for number, (q, (rows, columns), group) in enumerate(cases):
        kinds = (KINDS[number % 3], KINDS[number // 3 % 3])
        set_threads(1 + number % 2)
        case = Case(p, q, 1 + number % 3, rows, columns, min(group, columns), kinds)
        found = op.integers(case.x, case.weight, case.encoding, impl="native")
        assert torch.equal(found.long(), case.oracle()), (q, rows, columns, group, kinds)


@pytest.mark.parametrize("group", [64, 128, 192, 512, 1024, 1600])
def test_floats_equal_the_reference(isa, group):
    for kinds in itertools.product(KINDS, KINDS):
        case = Case(3, 5, 5, 19, 1600, group, kinds)
        assert torch.equal(op.integers(case.x, case.weight, case.encoding).long(), case.oracle())
        y = op.linear(case.x, case.x_scale, case.weight, case.encoding, impl="native")
        assert torch.equal(y, op.linear(case.x, case.x_scale, case.weight, case.encoding, impl="reference"))
        terms = case.oracle() * (case.scale * case.x_scale[:, None, None]).double()
        # Each term is rounded as an integer and as a scale, and by every later addition: u = 2^-24 each.
        bound = 1.001 * (terms.shape[-1] + 2) * 2.0**-24 * terms.abs().sum(-1)
        assert bool(((y.double() - terms.sum(-1)).abs() <= bound).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extreme", ["least", "greatest", "opposite"])
def test_extremes_are_exact(isa, kind, extreme):
    columns, rows, e = 33024, 5, encoding(8, kind)
    least, greatest = (0x80, 0x7F) if kind == "twos_complement" else (0, 0xFF)
    u, v = {"least": (least, least), "greatest": (greatest, greatest), "opposite": (least, greatest)}[extreme]
    planes = pack(torch.full((rows, columns), u, dtype=torch.uint8), 8)
    weight = op.prepare(CodedWeight.of(planes, columns, e))
    x = torch.full((3, columns), v, dtype=torch.uint8)
    x = x.view(torch.int8) if kind == "twos_complement" else x
    value = columns * int(meaning(torch.tensor(u), 8, kind)) * int(meaning(torch.tensor(v), 8, kind))
    assert op.integers(x, weight, e, impl="native").unique().tolist() == [value]


def test_any_coefficient_per_plane(isa):
    g = torch.Generator().manual_seed(5)
    codes = torch.tensor([0, 1, 2], dtype=torch.uint8)[torch.randint(0, 3, (9, 300), generator=g)]
    sign = torch.tensor([0, -1, 1])[codes.long()]  # plane 0 is plus, plane 1 is minus
    x = torch.randint(-128, 128, (2, 300), dtype=torch.int8, generator=g)
    weight = op.prepare(CodedWeight.of(pack(codes, 2), 300, ternary()))
    found = op.integers(x, weight, twos_complement(8), impl="native")[..., 0]
    assert torch.equal(found.long(), x.long() @ sign.T)
    odd = Encoding((-31, 1000, 7), offset=-12)
    codes = torch.randint(0, 8, (6, 300), dtype=torch.uint8, generator=g)
    values = -12 + torch.tensor([0, 7, 1000, 1007, -31, -24, 969, 976])[codes.long()]
    weight = op.prepare(CodedWeight.of(pack(codes, 3), 300, odd))
    found = op.integers(x, weight, twos_complement(8), impl="native")[..., 0]
    assert torch.equal(found.long(), x.long() @ values.T)


def test_bipolar_and_form_equals_xor_form():
    for p, q, columns in itertools.product((1, 2, 5, 8), (1, 3, 8), (1, 65, 576)):
        case = Case(p, q, 2, 4, columns, columns, ("bipolar", "bipolar"))
        total = torch.zeros(2, 4, dtype=torch.int64)
        for i, j in itertools.product(range(p), range(q)):
            differ = ((case.codes >> i) & 1)[None] ^ ((case.x >> j) & 1)[:, None]
            total += (1 << (i + j)) * (columns - 2 * differ.sum(-1, dtype=torch.int64))
        plain = CodedWeight.of(pack(case.codes, p), columns, bipolar(p))
        assert torch.equal(reference.integers(case.x_values, plain)[..., 0], total)
        assert torch.equal(op.integers(case.x, op.prepare(plain), bipolar(q))[..., 0].long(), total)


def test_columns_may_be_permuted_on_both_sides_only(isa):
    case = Case(3, 4, 2, 7, 257, 257, ("twos_complement", "twos_complement"))
    order = torch.randperm(257, generator=torch.Generator().manual_seed(1))
    moved = op.prepare(replace(case.source, planes=pack(case.codes[:, order], 3)))
    expected = op.integers(case.x, case.weight, case.encoding)
    assert torch.equal(op.integers(case.x[:, order], moved, case.encoding), expected)
    assert not torch.equal(op.integers(case.x, moved, case.encoding), expected)


def test_repack_is_reversible_and_padding_is_ignored(isa):
    for columns in (1, 7, 8, 63, 65, 513):
        case = Case(5, 3, 2, 6, columns, columns, ("unsigned", "unsigned"))
        planes = case.source.planes
        assert torch.equal(op.unprepare(case.weight).planes, planes)
        dirty = planes.clone()
        if columns % 8:
            dirty[..., -1] |= (0xFF << columns % 8) & 0xFF
        weight = op.prepare(replace(case.source, planes=dirty))
        assert torch.equal(weight.words, case.weight.words)
        assert torch.equal(weight.sums, case.weight.sums)


def test_result_depends_on_neither_batch_nor_threads(isa):
    case = Case(2, 8, 9, 531, 1024, 128, ("unsigned", "twos_complement"))
    together = op.linear(case.x, case.x_scale, case.weight, case.encoding)
    for threads in (1, 2, 5):
        set_threads(threads)
        assert torch.equal(op.linear(case.x, case.x_scale, case.weight, case.encoding), together)
        rows = zip(case.x, case.x_scale, strict=True)
        alone = [op.linear(x[None], scale[None], case.weight, case.encoding) for x, scale in rows]
        assert torch.equal(torch.cat(alone), together), threads


def test_views_empty_batch_and_compiled_graph():
    case = Case(4, 8, 3, 24, 128, 64, ("unsigned", "twos_complement"))
    args = (case.weight, case.encoding)
    expected = op.linear(case.x, case.x_scale, *args)
    wide = torch.stack([case.x, case.x + 1], -1)[..., 0]
    assert torch.equal(op.linear(wide, torch.stack([case.x_scale] * 2, 1)[:, 0], *args), expected)
    assert op.linear(case.x[:0], case.x_scale[:0], *args).shape == (0, 24)
    compiled = torch.compile(lambda x, s: op.linear(x, s * 2, *args) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(case.x, case.x_scale), op.linear(case.x, case.x_scale * 2, *args) + 1)
    w = case.weight
    tensors = (case.x, case.x_scale, w.words, w.sums, w.scale, w.offset)
    numbers = ([8, 4, 2, 1], list(case.encoding.coefficients), 0, 128, 64, w.reach)
    torch.library.opcheck(op.linear_op, (*tensors, *numbers), test_utils=("test_schema", "test_faketensor"))


def test_wrong_input_is_refused():
    case = Case(4, 4, 2, 8, 128, 64, ("unsigned", "twos_complement"))
    with pytest.raises(FormatError, match="multiple of 64 columns or whole rows, got group_size=32"):
        op.prepare(CodedWeight.of(case.source.planes, 128, unsigned(4), 32))
    with pytest.raises(FormatError, match="x has codes 8 to 8; 4 planes hold -8 to 7"):
        op.integers(torch.full((1, 128), 8, dtype=torch.int8), case.weight, case.encoding)
    with pytest.raises(FormatError, match="x has codes 16 to 16; 4 planes hold 0 to 15"):
        op.integers(torch.full((1, 128), 16, dtype=torch.uint8), case.weight, unsigned(4))
    with pytest.raises(FormatError, match=r"x must be int8 or uint8 \[T, 128\]"):
        op.linear(case.x.float(), case.x_scale, case.weight, case.encoding)
    with pytest.raises(FormatError, match=r"x_scale must be float32 \(2,\)"):
        op.linear(case.x, case.x_scale[:1], case.weight, case.encoding)
    big = op.prepare(CodedWeight.of(torch.zeros(8, 1, 4129, dtype=torch.uint8), 33026, unsigned(8)))
    with pytest.raises(FormatError, match="exceed 32 bits; use a smaller group_size"):
        op.integers(torch.zeros(1, 33026, dtype=torch.uint8), big, unsigned(8))
    with pytest.raises(FormatError, match="the encoding has 3 planes, the weight 4"):
        CodedWeight.of(case.source.planes, 128, unsigned(3))
    with pytest.raises(KernelUnavailable, match="no implementation 'cuda'; known: native, reference"):
        op.integers(case.x, case.weight, case.encoding, impl="cuda")
    with pytest.raises(KernelUnavailable, match="needs CPU tensors, got meta"):
        op.integers(case.x.to("meta"), case.weight, case.encoding, impl="native")


def test_the_built_module_holds_the_instructions_it_promises():
    module, objdump = native(), shutil.which("objdump")
    if objdump is None:
        pytest.skip("objdump is not installed")
    assert module
    if module.available_isas() == ["scalar"]:
        pytest.skip("not an x86-64 build")
    command = [objdump, "-d", "--no-show-raw-insn", module.__file__]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for instruction in ("vpopcntq", "vpdpbusd", "vpermb", "vpsadbw"):
        assert f"\t{instruction} " in listing, instruction
