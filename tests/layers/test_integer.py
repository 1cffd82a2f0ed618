"""Layers with quantized activations: the integer path equals float64 on the decoded numbers, for every scheme and form."""

from __future__ import annotations

import itertools

import pytest
import torch

from anybit.formats.activation import IntActivations
from anybit.formats.affine import Affine
from anybit.formats.bipolar import Bipolar
from anybit.formats.dual_grained import DualGrained
from anybit.formats.terms import CodeTerm, ColumnsTerm, LowRankTerm, Term, dense, save_terms
from anybit.layers.integer import IntegerProduct, bypassed, dequantized, refusal
from anybit.layers.linear import QuantLinear

ROWS, COLUMNS = 24, 192
SPECS = [
    IntActivations(),
    IntActivations(bits=4, symmetric=False),
    IntActivations(bits=6, granularity="group", group_size=64),
    IntActivations(bits=8, symmetric=False, granularity="group", group_size=32),
    IntActivations(bits=4, symmetric=False, rounded_zero=True),
]


def code_terms() -> list[CodeTerm]:
    """Weights of every form the kernel takes."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=draw)
    terms = []
    for bits, size, symmetric in ((4, 32, False), (8, COLUMNS, True), (3, 64, True), (4, COLUMNS, False)):
        grid = Affine.fit(weight, bits, size, symmetric)
        terms.append(CodeTerm.from_codes(grid.encode(weight), grid))
    scale = torch.rand(ROWS, 3, generator=draw).half() + 0.1
    terms.append(
        CodeTerm.from_codes(
            torch.randint(0, 8, (ROWS, COLUMNS), generator=draw, dtype=torch.uint8), Bipolar(3, 64, scale)
        )
    )
    inner, zero = torch.full((ROWS, 6), 9, dtype=torch.uint8), torch.full((ROWS, 6), 7, dtype=torch.uint8)
    dual = DualGrained(4, 32, torch.rand(ROWS, 1, generator=draw).half() * 0.01, inner, zero)
    terms.append(CodeTerm.from_codes(torch.randint(0, 16, (ROWS, COLUMNS), generator=draw, dtype=torch.uint8), dual))
    return terms


def with_side(term: CodeTerm) -> list[Term]:
    """The term with three float columns, whose codes decode to 0, and a low-rank term."""
    draw = torch.Generator().manual_seed(3)
    index = torch.tensor([0, 77, 191], dtype=torch.int32)
    grid = Affine.fit(term.dense(), 4, COLUMNS, True)
    weight = term.dense()
    weight[:, index.long()] = 0
    base = CodeTerm.from_codes(grid.encode(weight), grid)
    columns = ColumnsTerm(index, torch.randn(ROWS, 3, generator=draw).half(), (ROWS, COLUMNS))
    low = LowRankTerm(torch.randn(ROWS, 2, generator=draw).half(), torch.randn(2, COLUMNS, generator=draw).half())
    return [base, columns, low]


def inputs(tokens: int) -> torch.Tensor:
    x = torch.randn(tokens, COLUMNS, generator=torch.Generator().manual_seed(7))
    x[:, 77] *= 50
    x[0] += 3
    return x


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_integers_equal_float64_on_decoded_numbers(spec: IntActivations, tokens: int) -> None:
    for term in code_terms():
        terms: list[Term] = [term]
        assert refusal(terms, spec) == ""
        x = inputs(tokens)
        found = IntegerProduct(terms, spec)(x)
        read = spec.encode(x, {}).values().double()
        expected = read @ dense(terms).double().t()
        codes = spec.encode(x, {})
        reach = read.abs() + (
            0 if codes.offset is None else codes.offset.abs().amax(1, keepdim=True)
        )  # offset and codes cancel
        bound = 1e-5 * (reach @ dense(terms).double().abs().t()) + 1e-6
        assert bool(((found.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.granularity == "token"])
def test_a_last_group_that_is_short(spec: IntActivations) -> None:
    weight = torch.randn(ROWS, 96, generator=torch.Generator().manual_seed(2)) + 1
    grid = Affine.fit(weight, 4, 64, False)
    term = CodeTerm.from_codes(grid.encode(weight), grid)
    x = inputs(5)[:, :96]
    read = spec.encode(x, {}).values().double()
    expected = read @ term.dense().double().t()
    assert torch.allclose(IntegerProduct([term], spec)(x).double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("spec", SPECS)
def test_bfloat16_rows_are_the_float32_that_they_are(spec: IntActivations) -> None:
    for terms in ([code_terms()[0]], with_side(code_terms()[0])):
        apply, x = IntegerProduct(terms, spec), inputs(6).bfloat16()
        assert torch.equal(apply(x), apply(x.float()).bfloat16())


@pytest.mark.parametrize("spec", SPECS)
def test_columns_bypass_and_low_rank_is_added(spec: IntActivations) -> None:
    terms = with_side(code_terms()[0])
    x, index = inputs(6), bypassed(terms)
    found = IntegerProduct(terms, spec)(x)
    code, columns, low = terms
    read = dequantized(x, lambda rows: spec.encode(rows, {}, index), index)
    assert torch.equal(read[:, index.long()], x[:, index.long()])
    base = spec.encode(x, {}, index).values()
    expected = base.double() @ code.dense().double().t() + x.double() @ (columns.dense() + low.dense()).double().t()
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-3)


def test_an_outlier_in_a_bypassing_column_changes_no_code() -> None:
    spec, index = IntActivations(bits=4, symmetric=False), torch.tensor([77])
    x = inputs(4)
    before = spec.encode(x, {}, index)
    x[:, 77] *= 1000
    after = spec.encode(x, {}, index)
    assert torch.equal(before.codes, after.codes)
    assert torch.equal(before.scale, after.scale)


def test_a_layer_runs_its_scheme_from_its_form() -> None:
    spec, terms = IntActivations(bits=4, symmetric=False), with_side(code_terms()[0])
    form, tensors = save_terms(terms, (ROWS, COLUMNS))
    layer = QuantLinear(form | {"activations": spec.form()}, bias=False)
    layer.fill(tensors)
    x = inputs(10).view(2, 5, COLUMNS)
    expected = IntegerProduct(terms, spec)(x.view(10, -1))
    assert torch.equal(layer(x).view(10, -1), expected)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_static_scales_are_parameters_of_the_layer() -> None:
    spec = IntActivations(granularity="tensor", static=True)
    (term, *_), scale = code_terms(), torch.tensor([0.05])
    form, tensors = save_terms([term], (ROWS, COLUMNS))
    layer = QuantLinear(form | {"activations": spec.form()}, bias=False)
    layer.fill(tensors | {"input_scale": scale})
    x = inputs(3)
    expected = (x / 0.05).round().clamp(-127, 127) * 0.05 @ term.dense().t()
    assert torch.allclose(layer(x), expected, rtol=1e-4, atol=1e-3)


def test_tokens_do_not_see_each_other() -> None:
    for spec, term in itertools.product(SPECS, code_terms()):
        product = IntegerProduct([term], spec)
        x = inputs(17)
        assert torch.equal(product(x)[3:4], product(x[3:4]))
