"""Tender: its codes against a loop, its ways to the same integers, its calibration, and what happens when sums grow large."""

from __future__ import annotations

import pytest
import torch

from anybit.errors import CalibrationError, FormatError
from anybit.formats.activation import IntActivations, restore_activations
from anybit.formats.affine import Affine
from anybit.formats.bipolar import Bipolar
from anybit.formats.dual_grained import DualGrained
from anybit.formats.floating import FloatType
from anybit.formats.tender import TenderActivations
from anybit.formats.terms import CodeTerm, ColumnsTerm, LowRankTerm, Term, dense, save_terms
from anybit.layers import tender as forms
from anybit.layers.integer import bypassed, dequantized, refusal
from anybit.layers.linear import QuantLinear, quantized_product
from anybit.layers.tender import TenderProduct
from anybit.methods.base import InputStats
from anybit.methods.tender import TenderInputs

COLUMNS, ROWS = 200, 20


def inputs(tokens: int = 9) -> torch.Tensor:
    """Channels of very different size, some with a middle far from 0; hard rows."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, COLUMNS, generator=draw) * 2.0 ** torch.randint(-6, 6, (COLUMNS,), generator=draw)
    x[:, 7] *= 100
    x[:, 11] += 40
    x[2], x[3] = 0, 1e-3
    return x


def tensors_of(method: TenderInputs, x: torch.Tensor, norm: bool = True) -> dict[str, torch.Tensor]:
    ranges = torch.stack([torch.stack([part.amin(0), part.amax(0)]) for part in x.split(3)])
    return method.tensors(InputStats(len(x), sample_range=ranges, after_norm=norm), COLUMNS)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_those_of_a_loop(static: bool, bits: int) -> None:
    method, x = TenderInputs(bits=bits, groups=6, static=static), inputs()
    tensors = tensors_of(method, x)
    found, top = method.spec().encode(x, tensors), 2 ** (bits - 1) - 1
    shift, bias = tensors["input_shift"].tolist(), tensors["input_bias"].tolist()
    for t in range(len(x)):
        own = max(abs(float(x[t, k]) - bias[k]) / 2 ** shift[k] for k in range(COLUMNS)) / top
        scale = float(tensors["input_scale"]) if static else own
        assert float(found.scale[t, 0]) == pytest.approx(scale, rel=1e-5)
        for k in range(COLUMNS):
            value, step = float(x[t, k]), scale * 2 ** shift[k]
            # `up` groups never saturate on the calibration text, and a channel's error is relative to its own size
            assert abs(float(found.values()[t, k]) - value) <= step * 0.501 + 1e-5 * (abs(value) + abs(bias[k]))
    assert int(found.codes.abs().max()) <= top
    assert restore_activations({"activations": method.spec().form()}) == method.spec()


def test_every_channel_is_in_the_one_group_that_holds_it() -> None:
    x = inputs()
    method = TenderInputs(groups=8)
    tensors = tensors_of(method, x)
    largest = (x - tensors["input_bias"]).abs().amax(0)
    top = float(largest.max())
    for k, shift in enumerate(tensors["input_shift"].tolist()):
        assert float(largest[k]) <= top / 2 ** (7 - shift) * (1 + 1e-6)
        assert shift == 0 or float(largest[k]) > top / 2 ** (8 - shift) * (1 - 1e-6)
    exact = TenderInputs(groups=3).shifts(torch.tensor([8.0, 4.0, 4.0000005, 2.0, 0.1, 0.0]))
    assert exact.tolist() == [2, 1, 2, 0, 0, 0]
    down = TenderInputs(groups=3, direction="down").shifts(torch.tensor([8.0, 4.0, 2.0]))
    assert down.tolist() == [1, 0, 0]
    assert not tensors_of(method, x, norm=False)["input_bias"].any()
    with pytest.raises(CalibrationError):
        method.tensors(InputStats(), COLUMNS)


@pytest.mark.parametrize(("bits", "groups"), [(4, 1), (4, 5), (4, 8), (4, 13), (8, 1), (8, 4), (8, 9), (8, 16)])
def test_all_ways_give_the_same_integers(bits: int, groups: int) -> None:
    draw = torch.Generator().manual_seed(bits * 100 + groups)
    top = 2 ** (bits - 1)
    codes = torch.randint(-top, top, (7, COLUMNS), generator=draw).to(torch.int8)
    codes[0], codes[1] = top - 1, 1 - top
    shift = torch.randint(0, groups, (COLUMNS,), generator=draw).to(torch.uint8)
    shift[shift == min(3, groups - 2)] = groups - 1  # an empty group
    shift[0] = groups - 1
    weight = torch.randint(-128, 128, (ROWS, COLUMNS), generator=draw)
    by_group = sum((codes.double() * (shift == g)) @ weight.double().t() * 2.0**g for g in range(groups))
    whole = (codes.long() << shift.long()) @ weight.t()
    assert torch.equal(whole.double(), by_group)
    assert torch.equal(forms.segmented(codes, shift, weight, bits), whole)
    assert torch.equal(forms.shift_accumulate(codes, shift, weight), whole)
    count = forms.digits_needed(shift, bits)
    assert count == 1 + (bits + groups - 1 > 8) + (bits + groups - 1 > 16)
    parts = forms.digits((codes.int() << shift.int()).clamp_min((1 - top) << groups - 1), count)
    assert sum(part.int() * 256**i for i, part in enumerate(parts)).equal(
        (codes.int() << shift.int()).clamp_min((1 - top) << groups - 1)
    )
    if bits == 4 and groups <= 16:  # F4: shifted codes as FP8 numbers
        numbers = FloatType.parse("e4m3")
        shifted = (codes.clamp_min(-7).int() << shift.int()).float() * 2.0**-9
        assert torch.equal(numbers.value(numbers.round(shifted)), shifted)


def code_terms() -> list[CodeTerm]:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3))
    grids = [
        Affine.fit(weight, 8, COLUMNS, True),
        Affine.fit(weight, 4, 64, False),
        Bipolar.fit(weight, 3, 32),
    ]
    return [CodeTerm.from_codes(grid.encode(weight), grid) for grid in grids]


@pytest.mark.parametrize("groups", [1, 5, 9, 16])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_kernel_path_is_float64_on_decoded_numbers(bits: int, groups: int) -> None:
    method, x = TenderInputs(bits=bits, groups=groups), inputs(17)
    tensors = tensors_of(method, x)
    spec = method.spec()
    for term in code_terms():
        assert refusal([term], spec) == ""
        product = TenderProduct([term], spec, tensors)
        read = spec.encode(x, tensors).values().double()
        expected = read @ dense([term]).double().t()
        # the bias and the codes of a channel may cancel, so errors are relative to both
        reach = (read.abs() + tensors["input_bias"].abs()) @ dense([term]).double().abs().t()
        assert bool(((product(x).double() - expected).abs() <= 1e-5 * reach + 1e-6).all())
        assert torch.equal(product(x)[3:4], product(x[3:4]))


def test_two_levels_of_weight_scales_run_in_float() -> None:
    inner = torch.full((ROWS, 5), 9, dtype=torch.uint8)
    dual = DualGrained(4, 40, torch.ones(ROWS, 1).half(), inner, inner - 2)
    term = CodeTerm.from_codes(torch.full((ROWS, COLUMNS), 11, dtype=torch.uint8), dual)
    method, x = TenderInputs(groups=10), inputs()
    spec, tensors = method.spec(), tensors_of(method, x)
    assert "dual_grained" in refusal([term], spec)
    expected = spec.encode(x, tensors).values() @ term.dense().t()
    assert torch.allclose(quantized_product([term], spec, tensors)(x), expected, rtol=1e-5)


def test_bypassing_columns_and_low_rank_and_forms() -> None:
    draw = torch.Generator().manual_seed(4)
    method, x = TenderInputs(groups=10), inputs()
    tensors, spec = tensors_of(method, x), method.spec()
    index = torch.tensor([7, 11], dtype=torch.int32)
    weight = torch.randn(ROWS, COLUMNS, generator=draw)
    weight[:, index.long()] = 0
    grid = Affine.fit(weight, 4, COLUMNS, True)
    columns = ColumnsTerm(index, torch.randn(ROWS, 2, generator=draw).half(), (ROWS, COLUMNS))
    low = LowRankTerm(torch.randn(ROWS, 2, generator=draw).half(), torch.randn(2, COLUMNS, generator=draw).half())
    terms: list[Term] = [CodeTerm.from_codes(grid.encode(weight), grid), columns, low]
    bypass = bypassed(terms)
    read = dequantized(x, lambda rows: spec.encode(rows, tensors, bypass), bypass)
    assert torch.equal(read[:, index.long()], x[:, index.long()])
    expected = read.double() @ dense(terms[:2]).double().t() + x.double() @ low.dense().double().t()
    found = quantized_product(terms, spec, tensors)(x)
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-2)
    form, saved = save_terms(terms, (ROWS, COLUMNS))
    layer = QuantLinear(form | {"activations": spec.form()}, bias=False)
    layer.fill(saved | tensors)
    assert torch.equal(layer(x), found)


def test_one_group_is_one_scale_and_more_groups_are_finer() -> None:
    x = inputs()
    plain = IntActivations().encode(x, {}).values()
    method = TenderInputs(groups=1, bias="none")
    assert torch.allclose(method.spec().encode(x, tensors_of(method, x)).values(), plain, rtol=1e-6, atol=1e-6)
    errors = []
    for groups in range(1, 12):
        method = TenderInputs(groups=groups, bias="none")
        read = method.spec().encode(x, tensors_of(method, x)).values()
        # each channel against its own size: one huge channel does not spoil the others
        errors.append(float(((read - x).abs() / x.abs().amax(0).clamp_min(1e-9)).mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 10


def test_a_constant_added_to_a_channel_changes_nothing() -> None:
    x = inputs()
    method = TenderInputs(groups=9)
    before = method.spec().encode(x, tensors_of(method, x))
    y = x.clone()
    y[:, 30] += 64.0
    after = method.spec().encode(y, tensors_of(method, y))
    assert torch.allclose(before.values() - x, after.values() - y, atol=1e-4)


def test_sums_that_leave_32_bits_are_seen_and_taken_elsewhere() -> None:
    shift = torch.zeros(COLUMNS, dtype=torch.uint8)
    shift[:5] = 15
    codes, weight = torch.full((1, COLUMNS), 127, dtype=torch.int8), torch.full((ROWS, COLUMNS), 127)
    exact = forms.shift_accumulate(codes, shift, weight)
    assert not torch.equal(forms.shift_accumulate(codes, shift, weight, torch.int32).long(), exact)
    assert forms.accumulator(shift, 8, 127) == torch.int64
    assert forms.accumulator(shift[4:], 8, 127) == torch.int32
    grid = Affine(8, COLUMNS, torch.ones(ROWS, 1).half(), None)
    term = CodeTerm.from_codes((weight + 128).to(torch.uint8), grid)
    spec = TenderActivations(8, 16, static=True, bias=False)
    tensors = {"input_shift": shift, "input_scale": torch.ones(1)}
    x = torch.full((1, COLUMNS), 127.0)
    x[:, :5] *= 2.0**15
    found = quantized_product([term], spec, tensors)(x)
    assert torch.allclose(found.double(), exact.double(), rtol=1e-6)
    with pytest.raises(FormatError):
        TenderActivations(groups=25)
