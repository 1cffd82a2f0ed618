"""linear_w_a16 by codebooks, binary-coded and bipolar weights against a float64 oracle with a derived bound."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from anybit.errors import FormatError
from anybit.formats.binary_coded import BinaryCoded
from anybit.formats.bipolar import Bipolar
from anybit.formats.codebook import Codebook
from anybit.formats.decoder import Decoder, groups, per_column
from anybit.formats.nested_affine import NestedAffine
from anybit.formats.planes import pack
from anybit.kernels.linear_w_a16 import op, reference
from anybit.kernels.linear_w_a16.weight import Weight, of_decoder
from anybit.kernels.native import set_threads
from nested_case import nested
from random_terms import code_term

SHAPES = [(1, 1, 1), (3, 7, 3), (17, 31, 8), (16, 64, 32), (33, 67, 5), (19, 130, 32), (8, 257, 96), (48, 576, 64)]
KINDS = ("codebook", "binary_coded", "binary_coded-offset", "bipolar", "nested_affine")
NATIVE = ("native-lookup", "native-decode")


def wild(*shape: int, draw: torch.Generator) -> Tensor:
    """float16 of both signs over four orders of magnitude."""
    signs = torch.randint(0, 2, shape, generator=draw) * 2 - 1
    return (signs * 10.0 ** (torch.rand(shape, generator=draw) * 4 - 3)).half()


class Case:
    """Random codes under a random decoder, and the sizes that bound its rounding."""

    def __init__(self, kind: str, bits: int, rows: int, columns: int, group: int) -> None:
        draw = torch.Generator().manual_seed(rows * 7919 + columns * 31 + bits)
        count = groups(columns, group)
        self.codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=draw)
        self.bits, self.group, self.columns = bits, group, columns
        if kind == "codebook":
            self.decoder: Decoder = Codebook(bits, {bits: wild(rows, 2**bits, draw=draw)})
        elif kind == "bipolar":
            self.decoder = Bipolar(bits, group, wild(rows, count, draw=draw).abs())
        elif kind == "nested_affine":
            zero = torch.randint(0, 2**bits, (rows, count), dtype=torch.uint8, generator=draw)
            self.decoder = NestedAffine(bits, group, (bits,), wild(rows, count, draw=draw).abs(), {bits: zero}, {})
        else:
            offset = {bits: wild(rows, count, draw=draw)} if kind.endswith("offset") else None
            self.decoder = BinaryCoded(bits, group, {bits: wild(rows, count, bits, draw=draw)}, offset)
        weight = of_decoder(pack(self.codes, bits), self.decoder, columns)
        assert weight
        self.weight = weight
        self.x = torch.randn(6, columns, generator=draw) * 10.0 ** (torch.rand(columns, generator=draw) * 4 - 2)

    def oracle(self, x: Tensor) -> Tensor:
        return x.double() @ self.decoder.decode(self.codes).double().T

    def spread(self) -> Tensor:
        """The largest magnitude that any sum inside a kernel can have in place of weight [n, k]."""
        if isinstance(self.decoder, BinaryCoded):
            reach = self.decoder.alphas[self.bits].double().abs().sum(-1)
            if self.decoder.offsets:
                reach += self.decoder.offsets[self.bits].double().abs()
            return per_column(reach, self.columns, self.group)
        if isinstance(self.decoder, Bipolar):
            return per_column(self.decoder.scale.double() * (2**self.bits - 1), self.columns, self.group)
        if isinstance(self.decoder, NestedAffine):
            return per_column(self.decoder.scale.double() * 2**self.bits, self.columns, self.group)
        return self.decoder.decode(self.codes).double().abs()

    def bound(self, x: Tensor, impl: str) -> Tensor:
        """Roundings times 2^-24 times sum |x| spread. A lookup: 3 for a table entry, one per cell of a group, one per plane
        and offset of every group, 2 for factors. Anything decoded: one a plane for the weight, K for the sum."""
        lookup = 3 + (self.group // 4 + 2) + (self.bits + 1) * groups(self.columns, self.group) + 2
        decoded = self.columns + 1 + self.bits
        direct = impl == "native-decode" or isinstance(self.decoder, Codebook)
        return 1.001 * (decoded if direct else lookup) * 2.0**-24 * (x.double().abs() @ self.spread().T)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("kind", KINDS)
def test_within_the_derived_bound(isa, kind, bits):
    for shape in SHAPES:
        case = Case(kind, bits, *shape)
        for impl in NATIVE:
            for x in (case.x[:1], case.x):
                error = (op.multiply(x, case.weight, impl).double() - case.oracle(x)).abs()
                assert bool((error <= case.bound(x, impl)).all()), (shape, impl, len(x))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("kind", KINDS)
def test_decode_equals_the_format_bit_for_bit(isa, kind, bits):
    for shape in SHAPES:
        case = Case(kind, bits, *shape)
        assert torch.equal(op.decode(case.weight), case.decoder.decode(case.codes)), shape
        assert torch.equal(reference.decode(case.weight), case.decoder.decode(case.codes)), shape


@pytest.mark.parametrize("kind", KINDS)
def test_dirty_padding_does_not_matter(isa, kind):
    case = Case(kind, 3, 19, 67, 32)
    for impl in NATIVE:
        clean = op.multiply(case.x, case.weight, impl)
        case.weight.planes[..., -1] |= 0xF8
        assert torch.equal(op.multiply(case.x, case.weight, impl), clean)
        case.weight.planes[..., -1] &= 0x07


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_lookup_depends_on_neither_batch_nor_threads(isa, kind, bits):
    case = Case(kind, bits, 531, 576, 32)
    x = torch.randn(7, 576, generator=torch.Generator().manual_seed(1))
    set_threads(1)
    together = op.multiply(x, case.weight, "native-lookup")
    for threads in (1, 2, 5):
        set_threads(threads)
        alone = torch.cat([op.multiply(row[None], case.weight, "native-lookup") for row in x])
        assert torch.equal(alone, together), threads
        assert torch.equal(op.multiply(x, case.weight, "native-lookup"), together), threads


@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_never_lost(isa, kind):
    case = Case(kind, 2, 20, 70, 32)
    case.x[1, 69] = float("nan")
    for impl in NATIVE:
        y = op.multiply(case.x, case.weight, impl)
        assert bool(y[1].isnan().all())
        assert not bool(y[[0, 2]].isnan().any())


@pytest.mark.parametrize("kind", KINDS)
def test_a_nested_precision_reads_the_first_planes_only(kind):
    case = Case(kind, 5, 20, 70, 32)
    planes, first, second = case.weight.planes[:3], case.weight.first, case.weight.second
    first = first[..., :3] if kind.startswith("binary") else first[:, ::4] if kind == "codebook" else first
    nested = Weight(planes, first, second, case.weight.group_size, 70, case.weight.kind)
    y, want = op.multiply(case.x, nested), case.x @ reference.decode(nested).T
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-3)
    assert not torch.equal(y, op.multiply(case.x, case.weight))


@pytest.mark.parametrize("stored", [8, 5])
def test_nested_grids_at_every_width(isa, stored):
    for rows, columns, group in SHAPES[2:]:
        codes, decoder = nested(rows, columns, group, stored)
        x = torch.randn(3, columns, generator=torch.Generator().manual_seed(rows))
        for bits in decoder.precisions:
            weight = of_decoder(pack(codes, stored), decoder, columns, bits)
            assert torch.equal(op.decode(weight), decoder.decode(codes, bits)), (rows, columns, bits)
            assert torch.equal(reference.decode(weight), decoder.decode(codes, bits))
            spread = per_column(decoder.grid(bits)[0].double() * 2**stored, columns, group)
            roundings = 3 + (group // 4 + 2) + (bits + 1) * groups(columns, group) + 2
            bound = 1.001 * roundings * 2.0**-24 * (x.double().abs() @ spread.T)
            error = (
                op.multiply(x, weight, "native-lookup").double() - x.double() @ decoder.decode(codes, bits).double().T
            ).abs()
            assert bool((error <= bound).all()), (rows, columns, bits)


@pytest.mark.parametrize("kind", ["codebook", "binary_coded", "nested_affine", "affine"])
def test_widths_that_are_not_offered_are_refused(kind):
    term = code_term(kind, 6, 40, bits=4)
    with pytest.raises(FormatError, match=f"no 1 bits in this {kind} weight; it holds"):
        of_decoder(term.planes, term.decoder, 40, 1)


def test_a_scale_that_float16_cannot_move_is_refused():
    codes, decoder = nested(4, 32, 32)
    wide = replace(decoder, scale=torch.full_like(decoder.scale, 1100.0))
    of_decoder(pack(codes, 8), wide, 32, 6)
    with pytest.raises(FormatError, match="too large to read it at 2 bits"):
        of_decoder(pack(codes, 8), wide, 32, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_views_gradients_and_dtypes(kind):
    case = Case(kind, 4, 24, 64, 32)
    plain, weight = op.multiply(case.x, case.weight), case.weight
    views = Weight(
        weight.planes.repeat(1, 1, 2)[..., :8],
        torch.stack([weight.first] * 2, -1)[..., 0],
        weight.second if weight.second is None else weight.second.T.contiguous().T,
        *(weight.group_size, 64, weight.kind),
    )
    assert torch.equal(op.multiply(case.x, views), plain)
    assert torch.equal(op.Prepared(views)(case.x), plain)
    assert torch.equal(
        op.Prepared(weight)(case.x.bfloat16()), op.multiply(case.x.bfloat16().float(), weight).bfloat16()
    )
    x = case.x.clone().requires_grad_()
    op.Prepared(weight)(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(6, 24) @ case.decoder.decode(case.codes))


def test_wrong_input_is_refused():
    planes, table = torch.zeros(3, 5, 8, dtype=torch.uint8), torch.zeros(5, 8).half()
    with pytest.raises(FormatError, match=r"table must be float16 \(5, 8\), got torch.float16 \(5, 4\)"):
        Weight(planes, table[:, :4], None, 64, 64, "codebook").check()
    with pytest.raises(FormatError, match="one table and nothing beside it"):
        Weight(planes, table, table, 64, 64, "codebook").check()
    with pytest.raises(FormatError, match=r"alpha must be float16 \(5, 2, 3\)"):
        Weight(planes, table, None, 32, 64, "binary_coded").check()
    with pytest.raises(FormatError, match=r"offset must be float16 \(5, 2\)"):
        Weight(planes, torch.zeros(5, 2, 3).half(), torch.zeros(5, 2), 32, 64, "binary_coded").check()
    with pytest.raises(FormatError, match="no weight of kind 'gray'"):
        Weight(planes, table, None, 64, 64, "gray").check()
