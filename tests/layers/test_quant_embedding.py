"""Quantized embedding, the head tied to it, and putting both into a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from anybit.errors import FormatError, StructureError
from anybit.formats.terms import dense, save_terms
from anybit.layers.embedding import QuantEmbedding, TiedHead
from anybit.layers.linear import QuantLinear
from anybit.layers.swap import embedding_scale, swap_layers
from random_terms import KINDS, code_term, mixed_terms
from tiny_models import tiny

VOCAB, WIDTH = 21, 67
IDS = [torch.tensor(20), torch.tensor([0, 20, 0]), torch.tensor([[3, 1], [20, 0]]), torch.zeros(2, 0, dtype=torch.long)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def table(terms, scale=1.0):
    form, tensors = save_terms(terms, (VOCAB, WIDTH))
    embedding = QuantEmbedding(form, scale)
    embedding.fill(tensors)
    return embedding


def parts(kind):
    """One code term, or two on two ranges of columns."""
    if kind == "two":
        return [code_term("affine", VOCAB, WIDTH, (0, 24)), code_term("codebook", VOCAB, WIDTH, (24, WIDTH))]
    return [code_term(kind, VOCAB, WIDTH)]


@pytest.mark.parametrize("ids", IDS, ids=lambda ids: str(tuple(ids.shape)))
@pytest.mark.parametrize("kind", [*KINDS, "two"])
def test_rows_are_the_dense_rows_times_the_scale(kind, ids):
    terms = parts(kind)
    assert torch.equal(table(terms)(ids), dense(terms)[ids])
    assert torch.equal(table(terms, 8.5)(ids.int()), dense(terms)[ids] * 8.5)


def test_output_follows_the_model_dtype_and_codes_stay():
    terms = parts("affine")
    model = nn.ModuleList([table(terms, 3.0)]).to(torch.bfloat16)
    rows = model[0](torch.arange(VOCAB))
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows, (dense(terms) * 3.0).bfloat16())
    assert torch.equal(model.float()[0](torch.arange(VOCAB)), dense(terms) * 3.0)


def test_terms_an_embedding_cannot_read_are_refused():
    with pytest.raises(NotImplementedError, match="ColumnsTerm"):
        table(mixed_terms(VOCAB, WIDTH))(torch.tensor([1]))


@pytest.mark.parametrize("kind", ["affine", "codebook"])
def test_tied_head_is_the_dense_table_without_the_scale(kind):
    terms, x = parts(kind), torch.randn(2, 3, WIDTH)
    head = TiedHead(table(terms, 8.0))
    expected = nn.functional.linear(x.double(), dense(terms).double())
    torch.testing.assert_close(head(x).double(), expected, rtol=1e-5, atol=1e-4)
    assert (head.out_features, head.in_features) == (VOCAB, WIDTH)


def test_tied_head_follows_a_changed_table():
    first, second, x = parts("affine"), parts("affine"), torch.randn(3, WIDTH)
    embedding = table(first)
    head = TiedHead(embedding)
    head(x)
    embedding.fill(save_terms(second, (VOCAB, WIDTH))[1])
    torch.testing.assert_close(head(x), x @ dense(second).t(), rtol=1e-5, atol=1e-4)


class Model(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.embed, self.proj = nn.Embedding(VOCAB, WIDTH, padding_idx=2), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=bias)


def form(rows, columns):
    return save_terms([code_term("affine", rows, columns)], (rows, columns))[0]


def test_swap_puts_each_kind_of_layer_in_place():
    model = Model()
    swap_layers(model, {"embed": form(VOCAB, WIDTH), "proj": form(WIDTH, WIDTH)}, ("embed", "head"))
    assert isinstance(model.embed, QuantEmbedding)
    assert (model.embed.padding_idx, model.embed.output_scale) == (2, 1.0)
    assert isinstance(model.proj, QuantLinear)
    assert model.proj.bias.shape == (WIDTH,)
    assert isinstance(model.head, TiedHead)
    assert model.head.weight is model.embed.weight
    assert "head.weight" not in dict(model.named_parameters())


def test_untied_head_stays_what_it_is():
    model = Model()
    head = model.head
    swap_layers(model, {"embed": form(VOCAB, WIDTH)}, None)
    assert model.head is head
    swap_layers(model, {"head": form(VOCAB, WIDTH)}, ("embed", "head"))  # the embedding is float: nothing to follow
    assert isinstance(model.head, QuantLinear)
    assert model.head.bias is None


@pytest.mark.parametrize(
    ("forms", "match"),
    [
        ({"nowhere.proj": form(WIDTH, WIDTH)}, r"'nowhere\.proj'.*does not have"),
        ({"proj": form(WIDTH, WIDTH + 1)}, r"'proj' is \[67, 67\] in the model and \[67, 68\]"),
        ({"": form(WIDTH, WIDTH)}, "in the checkpoint"),
    ],
)
def test_layers_that_do_not_fit_are_named(forms, match):
    with pytest.raises(FormatError, match=match):
        swap_layers(Model(), forms, None)


def test_a_tied_head_with_a_bias_is_refused():
    with pytest.raises(StructureError, match=r"'head'.*bias"):
        swap_layers(Model(bias=True), {"embed": form(VOCAB, WIDTH)}, ("embed", "head"))


def test_embedding_scale():
    class Odd(nn.Embedding):
        pass

    assert embedding_scale(nn.Embedding(3, 4)) == 1.0
    assert embedding_scale(tiny("gemma3").get_input_embeddings()) == 8.0  # sqrt(64)
    with pytest.raises(StructureError, match=r"Odd.*keep it in float"):
        embedding_scale(Odd(3, 4))
