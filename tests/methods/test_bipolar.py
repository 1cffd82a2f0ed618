"""Bipolar integers: exact conversions, the mid-rise quantizer, and equal integers on every path that multiplies them."""

from __future__ import annotations

import pytest
import torch

from anybit.formats.activation import restore_activations
from anybit.formats.affine import Affine
from anybit.formats.bipolar import Bipolar
from anybit.formats.bipolar_activations import BipolarActivations
from anybit.formats.decoder import per_column
from anybit.formats.planes import pack
from anybit.formats.terms import CodeTerm, dense, save_terms
from anybit.kernels.linear_bits import op as linear_bits
from anybit.kernels.linear_bits.encoding import bipolar, twos_complement
from anybit.kernels.linear_bits.weight import CodedWeight
from anybit.layers.integer import IntegerProduct, refusal
from anybit.methods.base import InputStats
from anybit.methods.bipolar import SHRINKS, BipolarRTN, of_affine


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_the_odd_numbers_and_twos_complement_with_the_top_bit_flipped(bits: int) -> None:
    codes = torch.arange(2**bits, dtype=torch.uint8)[None]
    grid = Bipolar(bits, 2**bits, torch.ones(1, 1).half())
    values = grid.decode(codes)
    assert values[0].tolist() == list(range(1 - 2**bits, 2**bits, 2))
    assert torch.equal(grid.encode(values), codes)
    signed = codes.long() - 2 ** (bits - 1)
    assert torch.equal(values.long(), 2 * signed + 1)
    assert torch.equal((signed & (2**bits - 1)) ^ (1 << bits - 1), codes.long())


@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_convert_exactly_and_need_their_offset(symmetric: bool) -> None:
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(0)) + 0.5
    for bits in (2, 4, 8):
        grid = Affine.fit(weight, bits, 32, symmetric)
        codes = grid.encode(weight)
        converted, offset = of_affine(grid)
        again = converted.decode(codes).double() + per_column(offset, 96, 32).double()
        assert torch.allclose(again, grid.decode(codes).double(), rtol=1e-6, atol=1e-6)
        x = torch.randn(3, 96, generator=torch.Generator().manual_seed(1)).double()
        sums = x.view(3, 3, 32).sum(-1)
        with_offset = x @ converted.decode(codes).double().t() + sums @ offset.double().t()
        expected = x @ grid.decode(codes).double().t()
        assert torch.allclose(with_offset, expected, atol=1e-4)
        assert not torch.allclose(x @ converted.decode(codes).double().t(), expected, atol=1e-2)


@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("granularity", ["token", "group"])
def test_activations_are_those_of_a_loop(bits: int, granularity: str) -> None:
    spec = BipolarActivations(bits, granularity, 32)
    x = torch.randn(5, 70, generator=torch.Generator().manual_seed(bits))
    x[1], x[2, 0] = 0, 50
    found, top = spec.encode(x, {}), 2**bits - 1
    size = spec.columns_per_group(70)
    for t in range(5):
        for start in range(0, 70, size):
            group = x[t, start : start + size]
            scale = float(group.abs().mean() if bits == 1 else group.abs().max() / top)
            assert float(found.scale[t, start // size]) == pytest.approx(scale, rel=1e-5, abs=1e-30)
            for k, value in enumerate(group.tolist(), start):
                code = int(found.codes[t, k])
                assert code % 2 == 1
                assert abs(code) <= top
                if value and scale:
                    assert abs(value - code * scale) <= scale * 1.0001 or bits == 1
                    assert (code > 0) == (value > 0)
    assert torch.equal(found.values()[1], torch.zeros(70))
    mirrored = spec.encode(-x[3:], {})
    assert torch.equal(mirrored.codes, -found.codes[3:])
    assert restore_activations({"activations": spec.form()}) == spec
    bypass = torch.tensor([0, 69])
    assert not spec.encode(x, {}, bypass).codes[:, bypass].any()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("columns", [64, 129, 576])
def test_integers_are_equal_on_every_path(bits: int, columns: int) -> None:
    draw = torch.Generator().manual_seed(bits * 1000 + columns)
    codes = torch.randint(0, 2**bits, (9, columns), generator=draw, dtype=torch.uint8)
    codes[0] = 2**bits - 1
    spec = BipolarActivations(bits)
    x = torch.randn(5, columns, generator=draw)
    odd = spec.encode(x, {})
    exact = odd.codes.long() @ (2 * codes.long() - (2**bits - 1)).t()
    weight = linear_bits.prepare(CodedWeight.of(pack(codes, bits), columns, bipolar(bits)))
    u = ((odd.codes.int() + 2**bits - 1) // 2).to(torch.uint8)
    assert torch.equal(linear_bits.integers(u, weight, bipolar(bits))[:, :, 0].long(), exact)
    # mixed: bipolar weights times two's complement activations
    assert torch.equal(linear_bits.integers(odd.codes, weight, twos_complement(8))[:, :, 0].long(), exact)
    grid = Bipolar(bits, columns, torch.ones(9, 1).half())
    term = CodeTerm.from_codes(codes, grid)
    assert refusal([term], spec) == ""
    product = IntegerProduct([term], spec, lambda rows: spec.encode(rows, {}))
    expected = exact.double() * odd.scale.double()
    assert torch.allclose(product(x).double(), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    ones = IntegerProduct([term], spec, lambda rows: _unscaled(spec, rows))
    assert torch.equal(ones(x).long(), exact)  # sums below 2^24 survive the float epilogue as they are


def _unscaled(spec: BipolarActivations, rows: torch.Tensor):
    found = spec.encode(rows, {})
    return type(found)(found.codes, torch.ones_like(found.scale), None, found.group_size)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_search_keeps_the_best_of_its_grid(bits: int) -> None:
    weight = torch.randn(4, 100, generator=torch.Generator().manual_seed(2))
    weight[0, 0], weight[1] = 9, 0
    method = BipolarRTN(bits=bits, group_size=64)
    terms = method.quantize(weight, InputStats())
    assert save_terms(terms, (4, 100))[0] == method.plan((4, 100))
    found = dense(terms)
    for n in (0, 2, 3):
        for start, stop in ((0, 64), (64, 100)):
            group = weight[n, start:stop]
            odd = torch.arange(1 - 2**bits, 2**bits, 2).float()
            trials = [group.abs().mean()] if bits == 1 else [group.abs().max() * c / (2**bits - 1) for c in SHRINKS]
            losses = [(odd[(group[:, None] / s - odd).abs().argmin(1)] * s - group).square().sum() for s in trials]
            assert float((found[n, start:stop] - group).square().sum()) == pytest.approx(float(min(losses)), rel=0.01)


def test_mean_squared_errors_against_signed_integers() -> None:
    draw = torch.Generator().manual_seed(3)
    gaussian = torch.randn(512, 128, generator=draw)
    exponential = -torch.rand(512, 128, generator=draw).clamp_min(1e-9).log()
    laplace = exponential * (2.0 * (torch.rand(512, 128, generator=draw) < 0.5) - 1)
    printed = {2: (0.52, 1.33), 3: (0.74, 0.91), 4: (0.87, 0.91)}
    for bits, ratios in printed.items():
        for data, ratio in zip((gaussian, laplace), ratios, strict=True):
            odd = dense(BipolarRTN(bits=bits, search="none").quantize(data, InputStats()))
            top = 2 ** (bits - 1) - 1
            scale = data.abs().amax(1, keepdim=True) / top
            signed = (data / scale).round().clamp(-top - 1, top) * scale
            found = float((odd - data).square().mean() / (signed - data).square().mean())
            assert found == pytest.approx(ratio, rel=0.05)
