"""One shared cell: every nested layer of a transformers model follows it, compiled or not."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import anybit
from anybit.errors import InputError
from anybit.formats.binary_coded import BinaryCoded
from anybit.formats.codebook import Codebook
from anybit.formats.terms import CodeTerm, ColumnsTerm, dense, save_terms
from anybit.layers.linear import QuantLinear, Terms
from anybit.layers.precision import Precision, available_precisions, width_read
from nested_case import WIDTHS, nest, nested
from tiny_checkpoints import quantize_tiny
from tiny_models import logits

ROWS, COLUMNS, GROUP = 13, 67, 16
NESTED = ("nested_affine", "codebook", "binary_coded")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.compiler.reset()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return nest(quantize_tiny("llama", tmp_path_factory.mktemp("nested")), but=("v_proj",))


def nested_term(kind):
    if kind == "nested_affine":
        return CodeTerm.from_codes(*nested(ROWS, COLUMNS, GROUP))
    codes, count = torch.randint(0, 256, (ROWS, COLUMNS), dtype=torch.uint8), -(-COLUMNS // GROUP)
    if kind == "codebook":
        return CodeTerm.from_codes(codes, Codebook(8, {p: torch.randn(ROWS, 2**p).half() for p in WIDTHS}))
    alphas = {p: torch.randn(ROWS, count, p).half() for p in WIDTHS}
    offsets = {p: torch.randn(ROWS, count).half() for p in WIDTHS}
    return CodeTerm.from_codes(codes, BinaryCoded(8, GROUP, alphas, offsets))


def layer_of(terms):
    form, tensors = save_terms(terms, (ROWS, COLUMNS))
    layer = QuantLinear(form, bias=False)
    layer.fill(tensors)
    layer.precision = Precision(available_precisions([form]))
    return layer


@pytest.mark.parametrize("tokens", [1, 50])
@pytest.mark.parametrize("kind", NESTED)
def test_a_layer_follows_the_cell(kind, tokens):
    terms = [
        nested_term(kind),
        ColumnsTerm(torch.tensor([3], dtype=torch.int32), torch.randn(ROWS, 1).half(), (ROWS, COLUMNS)),
    ]
    layer, x = layer_of(terms), torch.randn(tokens, COLUMNS)
    first = layer(x)
    for bits in (*WIDTHS, *reversed(WIDTHS)):
        layer.precision.bits = bits
        weight = dense(terms, bits).double()
        reach = x.double().abs() @ (weight.abs() + terms[0].dense(bits).abs().amax()).T
        assert bool(((layer(x).double() - x.double() @ weight.T).abs() <= 2e-6 * reach).all()), bits
    layer.precision.bits = 8
    assert torch.equal(layer(x), first)
    before = {bits: id(found) for bits, found in layer._products.items()}
    assert set(before) == set(WIDTHS)
    layer.precision.bits = 2
    layer(x)
    assert {bits: id(found) for bits, found in layer._products.items()} == before


def test_layers_of_one_width_do_not_follow():
    assert [width_read((4,), bits) for bits in (1, 4, 8)] == [4, 4, 4]
    assert [width_read((2, 3, 6), bits) for bits in (1, 2, 3, 4, 5, 6, 8)] == [2, 2, 3, 6, 6, 6, 6]


@pytest.mark.parametrize("kind", NESTED)
def test_a_compiled_layer_does_not_keep_its_precision(kind):
    layer, x = layer_of([nested_term(kind)]), torch.randn(3, COLUMNS)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for bits in (8, 2, 4, 2, 8, 3, 6, 4):
            layer.precision.bits = bits
            assert torch.equal(compiled(x), layer(x)), bits


def test_switching_back_finds_the_compiled_graph_again():
    layer, x, seen = layer_of([nested_term("nested_affine")]), torch.randn(3, COLUMNS), []

    def backend(graph, example_inputs):
        seen.append(layer.precision.bits)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    with torch.no_grad():
        for bits in (8, 2, 4, 2, 8, 4):
            layer.precision.bits = bits
            assert torch.equal(compiled(x), layer(x)), bits
    assert seen == [8, 2, 4]


def test_all_layers_of_a_loaded_model_share_one_cell(checkpoint):
    model, ids = anybit.load(checkpoint), torch.randint(3, 90, (1, 20))
    layers = [module for module in model.modules() if isinstance(module, Terms)]
    assert len(layers) > 10
    assert {id(layer.precision) for layer in layers} == {id(model.precision)}
    assert model.precision.available == WIDTHS
    assert int(model.precision.cell[0]) == model.precision.bits == 8
    whole = logits(model, ids)
    low = anybit.load(checkpoint, 2)
    assert low.precision.bits == 2
    assert int(low.precision.cell[0]) == 2
    model.precision.bits = 2
    assert torch.equal(logits(low, ids), logits(model, ids))
    assert not torch.equal(logits(low, ids), whole)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    assert torch.equal(logits(plain, ids), whole)
    plain.precision.bits = 2
    assert torch.equal(logits(plain, ids), logits(low, ids))


def test_every_width_of_a_model_is_its_dense_weights(checkpoint):
    model, ids = anybit.load(checkpoint), torch.randint(3, 90, (1, 20))
    dense_model = anybit.load(checkpoint)
    for bits in WIDTHS:
        model.precision.bits = bits
        for name, layer in model.named_modules():
            if isinstance(layer, QuantLinear):
                float_layer = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
                width = bits if "v_proj" not in name else None
                float_layer.weight.data = dense(layer.terms(), width)
                dense_model.set_submodule(name, float_layer)
        torch.testing.assert_close(logits(model, ids), logits(dense_model, ids), rtol=1e-4, atol=1e-4)


def test_what_is_not_there_is_refused(checkpoint, tmp_path):
    with pytest.raises(InputError, match=r"precision 5 is not in this checkpoint; it holds \[2, 3, 4, 6, 8\]"):
        anybit.load(checkpoint, 5)
    single = quantize_tiny("llama", tmp_path)
    assert anybit.load(single).precision.available == (4,)
    with pytest.raises(InputError, match=r"precision 2 is not in this checkpoint; it holds \[4\]"):
        anybit.load(single, 2)


def test_nested_layers_without_a_width_in_common_are_refused():
    part = {"term": "code", "bits": 8}
    forms = [{"terms": [{**part, "precisions": widths}]} for widths in ([2, 4, 8], [3, 6, 8], [3, 6])]
    assert available_precisions(forms[:2]) == (8,)
    with pytest.raises(InputError, match="no precision in common"):
        available_precisions(forms)
