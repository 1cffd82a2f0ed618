"""Every decoder against a slow obvious oracle; planes exact for every width and odd shape; terms round-trip."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anybit.errors import FormatError
from anybit.formats.affine import Affine
from anybit.formats.binary_coded import BinaryCoded
from anybit.formats.bipolar import Bipolar
from anybit.formats.codebook import Codebook
from anybit.formats.dual_grained import DualGrained
from anybit.formats.floating import Floating, FloatType
from anybit.formats.planes import pack, unpack
from anybit.formats.terms import (
    CodeTerm,
    ColumnsTerm,
    LowRankTerm,
    bits_per_weight,
    dense,
    load_terms,
    save_terms,
    tensor_specs,
)

SIZES = (1, 2, 7, 8, 9, 31, 64, 67)


@pytest.mark.parametrize("bits", range(1, 9))
def test_planes_are_exact_inverses_for_every_width_and_shape(bits):
    generator = torch.Generator().manual_seed(bits)
    for rows, columns in itertools.product((1, 3, 17), SIZES):
        codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
        planes = pack(codes, bits)
        assert planes.shape == (bits, rows, -(-columns // 8))
        assert torch.equal(unpack(planes, columns), codes)
        for i, n, k in [(0, 0, 0), (bits - 1, rows - 1, columns - 1)]:
            bit = (int(planes[i, n, k // 8]) >> (k % 8)) & 1
            assert bit == (int(codes[n, k]) >> (bits - 1 - i)) & 1
        if columns % 8:
            assert not bool((planes[..., -1] >> (columns % 8)).any())


def test_first_planes_are_the_leading_bits():
    codes = torch.randint(0, 256, (5, 21), dtype=torch.uint8)
    for p in range(1, 9):
        assert torch.equal(unpack(pack(codes, 8)[:p].contiguous(), 21), codes >> (8 - p))


def test_padding_bits_are_ignored_when_reading():
    codes = torch.randint(0, 8, (4, 13), dtype=torch.uint8)
    planes = pack(codes, 3)
    planes[..., -1] |= 0xE0
    assert torch.equal(unpack(planes, 13), codes)


@pytest.mark.parametrize(
    ("codes", "bits"),
    [(torch.full((2, 3), 4, dtype=torch.uint8), 2), (torch.zeros(2, 3), 2), (torch.zeros(2, 3, dtype=torch.uint8), 9)],
)
def test_codes_that_do_not_fit_are_refused(codes, bits):
    with pytest.raises(FormatError):
        pack(codes, bits)


def decoders(rows: int, columns: int, bits: int, group: int) -> list:
    g = -(-columns // group)
    w = torch.randn(rows, columns)
    half = lambda *shape: (torch.rand(*shape) + 0.1).half()  # noqa: E731
    found = [
        Affine.fit(w, bits, group),
        Affine.fit(w, bits, group, symmetric=True),
        Bipolar.fit(w, bits, group),
        Codebook(bits, {bits: torch.randn(rows, 2**bits).half()}),
        BinaryCoded(bits, group, {bits: half(rows, g, bits)}, {bits: torch.randn(rows, g).half()}),
        DualGrained(
            bits,
            group,
            half(rows, 1),
            torch.randint(1, 9, (rows, g), dtype=torch.uint8),
            torch.randint(0, 2**bits, (rows, g), dtype=torch.uint8),
        ),
    ]
    if bits >= 2:
        found.append(Floating.fit(w, FloatType(min(bits - 1, 3), bits - 1 - min(bits - 1, 3)), group))
    return found


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(1, 8), rows=st.integers(1, 5), columns=st.integers(1, 40), group=st.integers(1, 41))
def test_decode_encode_decode_is_a_fixed_point(bits, rows, columns, group):
    for decoder in decoders(rows, columns, bits, group):
        values = decoder.decode(decoder.encode(torch.randn(rows, columns) * 2))
        assert torch.equal(decoder.decode(decoder.encode(values)), values), decoder.kind


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(1, 6), columns=st.integers(1, 20), group=st.integers(1, 21))
def test_encode_picks_the_nearest_representable_value(bits, columns, group):
    values = torch.randn(3, columns) * 2
    for decoder in decoders(3, columns, bits, group):
        chosen = (decoder.decode(decoder.encode(values)) - values).abs()
        for code in range(2**bits):
            try:
                other = (decoder.decode(torch.full((3, columns), code, dtype=torch.uint8)) - values).abs()
            except FormatError:  # a dual-grained code outside int8 is not a candidate
                continue
            assert bool((chosen <= other * (1 + 1e-5) + 1e-6).all()), decoder.kind


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_affine_oracle_and_short_last_group(bits):
    w = torch.randn(3, 10)
    grid = Affine.fit(w, bits, 4)
    codes = grid.encode(w)
    assert grid.scale.shape == (3, 3)
    for n, k in itertools.product(range(3), range(10)):
        scale, zero = float(grid.scale[n, k // 4]), int(grid.zero[n, k // 4])
        assert float(grid.decode(codes)[n, k]) == pytest.approx(scale * (int(codes[n, k]) - zero), rel=1e-6)
    error = (grid.decode(codes) - w).abs()
    assert bool((error <= grid.scale.float().repeat_interleave(4, 1)[:, :10] * 0.51 + 1e-3).all())


@pytest.mark.parametrize("constant", [0.0, 3.0, -2.5])
def test_affine_represents_constant_groups(constant):
    w = torch.full((2, 32), constant)
    grid = Affine.fit(w, 4, 32)
    assert torch.allclose(grid.decode(grid.encode(w)), w, rtol=1e-3, atol=0)


def test_binary_coded_oracle():
    decoder = BinaryCoded(2, 3, {2: torch.tensor([[[2.0, 0.5]]]).half()}, {2: torch.tensor([[0.25]]).half()})
    codes = torch.tensor([[0, 1, 3]], dtype=torch.uint8)
    assert decoder.decode(codes).tolist() == [[0.25 - 2 - 0.5, 0.25 - 2 + 0.5, 0.25 + 2 + 0.5]]


def test_codebook_reads_nested_precisions():
    tables = {2: torch.tensor([[-1.0, 0, 1, 2]]).half(), 1: torch.tensor([[-0.5, 1.5]]).half()}
    codes = torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8)
    assert Codebook(2, tables).decode(codes, 1).tolist() == [[-0.5, -0.5, 1.5, 1.5]]
    with pytest.raises(FormatError, match="no codebook for 3 bits"):
        Codebook(2, tables).decode(codes, 3)


def test_dual_grained_is_an_exact_int8_weight_or_refuses():
    ok = DualGrained(
        4, 4, torch.ones(1, 1).half(), torch.tensor([[8]], dtype=torch.uint8), torch.tensor([[8]], dtype=torch.uint8)
    )
    codes = torch.tensor([[0, 8, 15, 9]], dtype=torch.uint8)
    assert ok.integer(codes).tolist() == [[-64, 0, 56, 8]]
    wide = DualGrained(4, 4, torch.ones(1, 1).half(), torch.tensor([[20]], dtype=torch.uint8), ok.group_zero)
    with pytest.raises(FormatError, match="outside int8"):
        wide.integer(codes)


def test_float_types_match_torch_and_known_tables():
    assert FloatType(4, 3).largest == 448
    assert FloatType(5, 2).largest == 57344
    assert FloatType(2, 1).magnitudes.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert FloatType(3, 2).largest == 28
    x = torch.cat(
        [torch.randn(4000) * s for s in (1e-3, 1, 100)] + [torch.tensor([0.0, -0.0, 448.0, 1e-9, -460.0, 1e9])]
    )
    for type, dtype in ((FloatType(4, 3), torch.float8_e4m3fn), (FloatType(5, 2), torch.float8_e5m2)):
        expected = x.clamp(-type.largest, type.largest).to(dtype).float()
        assert torch.equal(type.value(type.round(x)), expected)
        ties = (type.magnitudes[:100:1][:-1] + type.magnitudes[1:100]) / 2
        ties = ties[torch.isfinite(ties)]
        assert torch.equal(type.value(type.round(ties)), ties.to(dtype).float())


def test_terms_sum_and_survive_saving():
    w = torch.randn(6, 40)
    low, high = Affine.fit(w[:, :24], 3, 8), Bipolar.fit(w[:, 24:], 2, 16)
    first = CodeTerm(pack(low.encode(w[:, :24]), 3), low, (6, 40), (0, 24))
    second = CodeTerm(pack(high.encode(w[:, 24:]), 2), high, (6, 40), (24, 40))
    columns = ColumnsTerm(torch.tensor([3, 17], dtype=torch.int32), torch.randn(6, 2).half(), (6, 40))
    rank = LowRankTerm(torch.randn(6, 2).half(), torch.randn(2, 40).half())
    terms = [first, second, columns, rank]
    form, tensors = save_terms(terms, (6, 40))
    oracle = torch.cat([low.decode(low.encode(w[:, :24])), high.decode(high.encode(w[:, 24:]))], 1)
    oracle[:, [3, 17]] += columns.weight.float()
    oracle = oracle + rank.u.float() @ rank.v.float()
    assert torch.equal(dense(load_terms(form, tensors)), oracle)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == tensor_specs(form)
    stored = sum(t.numel() * t.element_size() for t in tensors.values()) * 8
    assert bits_per_weight(form) == stored / 240


def test_bits_per_weight_counts_scales_and_zeros():
    w = torch.randn(4, 64)
    grid = Affine.fit(w, 4, 32)
    form, _ = save_terms([CodeTerm.from_codes(grid.encode(w), grid)], (4, 64))
    assert bits_per_weight(form) == 4 + (16 + 8) / 32


def test_wrong_tensors_and_unknown_parts_are_named():
    w = torch.randn(4, 64)
    grid = Affine.fit(w, 4, 32)
    form, tensors = save_terms([CodeTerm.from_codes(grid.encode(w), grid)], (4, 64))
    with pytest.raises(FormatError, match="'zero' is missing"):
        load_terms(form, {k: v for k, v in tensors.items() if k != "zero"})
    with pytest.raises(FormatError, match="its form says"):
        load_terms(form, tensors | {"scale": tensors["scale"].float()})
    with pytest.raises(FormatError, match="update anybit"):
        tensor_specs({"shape": [1, 1], "terms": [{"term": "spline"}]})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_overflow_are_refused(bad):
    w = torch.randn(2, 32)
    w[0, 3] = bad
    with pytest.raises(FormatError):
        Affine.fit(w, 4, 32)
