"""QuantLinear against the dense weight in float64: every decoder, every sum of terms, both float dtypes."""

from __future__ import annotations

import pytest
import torch

from anybit.errors import FormatError
from anybit.formats.terms import dense, save_terms
from anybit.kernels.linear_w_a16 import op
from anybit.layers.linear import QuantLinear, kernel_name
from random_terms import KINDS, code_term, mixed_terms

ROWS, COLUMNS = 13, 67  # neither a multiple of 8, nor of the group size
MIXES = [("affine", "affine"), ("affine", "codebook"), ("float", "affine-symmetric")]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def layer_of(terms, bias=None):
    form, tensors = save_terms(terms, (ROWS, COLUMNS))
    layer = QuantLinear(form, bias=bias is not None)
    layer.fill(tensors if bias is None else {**tensors, "bias": bias})
    return layer


def check(layer, terms, bias, x, relative):
    """Each output within `relative` of the sum of its absolute products, the only honest unit of rounding."""
    weight = dense(terms).double()
    expected = x.double() @ weight.t() + (0 if bias is None else bias.double())
    allowed = relative * (x.double().abs() @ weight.abs().t() + (0 if bias is None else bias.double().abs()))
    y = layer(x)
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], ROWS)
    assert bool(((y.double() - expected).abs() <= allowed).all())


@pytest.mark.parametrize("shape", [(COLUMNS,), (1, COLUMNS), (2, 20, COLUMNS)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_decoder(kind, shape):
    terms = [code_term(kind, ROWS, COLUMNS)]
    check(layer_of(terms), terms, None, torch.randn(shape), 1e-6)
    check(layer_of(terms), terms, None, torch.randn(shape).bfloat16(), 2**-7)


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize(("first", "second"), MIXES)
def test_sums_of_terms_with_a_bias(first, second, tokens):
    terms, bias = mixed_terms(ROWS, COLUMNS, first, second), torch.randn(ROWS)
    layer, x = layer_of(terms, bias), torch.randn(tokens, COLUMNS)
    check(layer, terms, bias, x, 2e-6)
    check(layer, terms, bias, x.bfloat16(), 2**-6)
    for name, p in layer.named_parameters():  # every tensor counts: a layer that forgets a term would pass loose bounds
        if p.is_floating_point():
            before = layer(x)
            changed = torch.randn(p.shape).to(p.dtype) if name == "bias" else p.data * 2
            other = layer_of(terms, bias)
            other.fill({name: changed})
            assert not torch.equal(other(x), before), name


def test_affine_computes_in_float32_whatever_the_dtype_of_x():
    terms = [code_term("affine", ROWS, COLUMNS)]
    layer, x = layer_of(terms), torch.randn(5, COLUMNS).bfloat16()
    assert torch.equal(layer(x), layer(x.float()).bfloat16())


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64, torch.float32])
def test_casting_a_model_leaves_codes_and_scales_alone(cast):
    terms, bias = mixed_terms(ROWS, COLUMNS, "affine", "codebook"), torch.randn(ROWS)
    layer = layer_of(terms, bias)
    before = {name: p.data.clone() for name, p in layer.named_parameters()}
    model = torch.nn.Sequential(layer, torch.nn.Linear(ROWS, 2)).to(cast)
    assert model[1].weight.dtype == cast
    for name, p in layer.named_parameters():
        assert p.dtype == before[name].dtype, name
        assert torch.equal(p.data, before[name]), name
    check(layer, terms, bias, torch.randn(3, COLUMNS), 2e-6)


def test_new_tensors_replace_what_was_cached():
    first, second = [code_term("affine", ROWS, COLUMNS)], [code_term("affine", ROWS, COLUMNS)]
    layer, x = layer_of(first), torch.randn(2, COLUMNS)
    layer(x)
    layer.fill(save_terms(second, (ROWS, COLUMNS))[1])
    check(layer, second, None, x, 1e-6)


def test_tensors_that_do_not_fit_the_form_are_refused():
    layer = layer_of([code_term("affine", ROWS, COLUMNS)])
    layer.fill({"scale": torch.ones(ROWS, 4, dtype=torch.float16)})
    with pytest.raises(FormatError, match="scale"):
        layer(torch.randn(1, COLUMNS))


def test_kernel_names():
    affine, mixed = [code_term("affine", ROWS, COLUMNS)], mixed_terms(ROWS, COLUMNS)
    assert kernel_name(save_terms(affine, (ROWS, COLUMNS))[0], 1) == op.choose(1)
    assert kernel_name(save_terms(affine, (ROWS, COLUMNS))[0], 99) == op.choose(99)
    assert kernel_name(save_terms(mixed, (ROWS, COLUMNS))[0], 1) == "reference"


def test_shape_and_form_show_in_print():
    assert "67, 13, form=affine3+affine4+columns+low_rank" in repr(layer_of(mixed_terms(ROWS, COLUMNS)))
