"""A weight cut along its inputs or stacked along its outputs decodes to the same numbers, bit for bit."""

from __future__ import annotations

import pytest
import torch

from anybit.errors import FormatError
from anybit.formats.activation import restore_activations
from anybit.formats.slices import column_slice, same_tensors, stacked, static_slice
from anybit.formats.terms import CodeTerm, ColumnsTerm, LowRankTerm, dense, row_slice, save_terms, tensor_specs
from random_terms import KINDS, code_term

N, K = 12, 96


@pytest.mark.parametrize("cut", [(0, 48), (48, 96), (16, 32), (0, 96)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_decodes_to_those_columns(kind, cut):
    term = code_term(kind, N, K)
    piece = column_slice(term, *cut)
    assert torch.equal(piece.dense(), term.dense()[:, slice(*cut)])
    form, tensors = save_terms([piece], piece.shape)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == tensor_specs(form)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_columns_cut_together_give_the_corner(kind):
    term = code_term(kind, N, K)
    corner = column_slice(row_slice(term, 4, 8), 48, 96)
    assert torch.equal(corner.dense(), term.dense()[4:8, 48:])


@pytest.mark.parametrize("cut", [(0, 48), (48, 96), (96, 192), (48, 192)])
def test_scales_of_blocks_are_cut_at_blocks(cut):
    term = code_term("blocked", N, 2 * K)
    piece = column_slice(term, *cut)
    assert torch.equal(piece.dense(), term.dense()[:, slice(*cut)])
    form, tensors = save_terms([piece], piece.shape)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == tensor_specs(form)
    assert torch.equal(stacked([[piece], [piece]])[0].dense(), torch.cat([piece.dense()] * 2))


def test_a_cut_inside_a_block_is_refused_and_inside_the_only_block_is_not():
    with pytest.raises(FormatError, match="whole groups of 48"):
        column_slice(code_term("blocked", N, 2 * K), 16, 192)
    only = code_term("blocked", N, 48)
    assert torch.equal(column_slice(only, 16, 48).dense(), only.dense()[:, 16:])


def test_one_group_a_row_stays_one_group():
    term = code_term("affine-symmetric", N, K, group=K)
    piece = column_slice(term, 48, 96)
    assert piece.decoder.group_size == 48
    assert torch.equal(piece.dense(), term.dense()[:, 48:])


def test_a_nested_weight_keeps_every_width():
    term = code_term("nested_affine", N, K)
    for bits in term.decoder.precisions:
        assert torch.equal(column_slice(term, 16, 64).dense(bits), term.dense(bits)[:, 16:64])


def test_float_columns_follow_the_cut():
    index = torch.tensor([3, 50, 95], dtype=torch.int32)
    term = ColumnsTerm(index, torch.randn(N, 3).half(), (N, K))
    assert torch.equal(column_slice(term, 48, 96).dense(), term.dense()[:, 48:])
    assert column_slice(term, 4, 48) is None


def test_low_rank_pieces_add_up():
    term = LowRankTerm(torch.randn(N, 4).half(), torch.randn(4, K).half())
    x = torch.randn(3, K)
    parts = [x[:, a:b] @ column_slice(term, a, b).dense().t() for a, b in ((0, 40), (40, 96))]
    torch.testing.assert_close(sum(parts), x @ term.dense().t())


@pytest.mark.parametrize(
    ("cut", "what"), [((4, 96), "whole bytes"), ((0, 12), "whole bytes"), ((8, 96), "whole groups")]
)
def test_a_cut_inside_a_byte_or_group_is_refused(cut, what):
    with pytest.raises(FormatError, match=what):
        column_slice(code_term("affine", N, K), *cut)


def test_mixed_precision_along_the_inputs_is_refused():
    term = code_term("affine", N, K)
    half = CodeTerm(term.planes, term.decoder, (N, 2 * K), (0, K))
    with pytest.raises(FormatError, match="mixed along its inputs"):
        column_slice(half, 0, K)


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_weights_are_the_rows_of_both(kind):
    one, other = code_term(kind, N, K), code_term(kind, 2 * N, K)
    (joined,) = stacked([[one], [other]])
    assert torch.equal(joined.dense(), torch.cat([one.dense(), other.dense()]))


def test_what_is_not_written_alike_is_not_stacked():
    four, three = code_term("affine", N, K, bits=4), code_term("affine", N, K, bits=3)
    assert stacked([[four], [three]]) is None
    assert stacked([[four], [code_term("affine", N, K, bits=4, group=32)]]) is None
    assert stacked([[four], [four, four]]) is None
    columns = [ColumnsTerm(torch.tensor([i], dtype=torch.int32), torch.ones(N, 1).half(), (N, K)) for i in (1, 2)]
    assert stacked([[four, columns[0]], [four, columns[1]]]) is None
    low = LowRankTerm(torch.ones(N, 1).half(), torch.ones(1, K).half())
    assert stacked([[four, low], [four, low]]) is None
    assert torch.equal(dense(stacked([[four, columns[0]]] * 2)), torch.cat([dense([four, columns[0]])] * 2))


def static(granularity, **more):
    return restore_activations({"activations": {"kind": "int", "granularity": granularity, "static": True, **more}})


def test_static_scales_are_cut_at_groups_only():
    spec, table = static("group", group_size=32), {"input_scale": torch.arange(3.0)}
    assert static_slice(spec, table, K, 32, 96)["input_scale"].tolist() == [1, 2]
    assert static_slice(spec, table, K, 0, K) == table
    with pytest.raises(FormatError, match="whole groups of 32"):
        static_slice(spec, table, K, 0, 48)
    whole = {"input_scale": torch.ones(1)}
    assert static_slice(static("tensor"), whole, K, 0, 48) == whole


def test_tender_is_not_divided():
    spec = restore_activations({"activations": {"kind": "tender"}})
    with pytest.raises(FormatError, match="tender"):
        static_slice(spec, {}, K, 0, 48)


def test_same_tensors_compares_names_and_values():
    one = {"a": torch.ones(2)}
    assert same_tensors([one, {"a": torch.ones(2)}])
    assert not same_tensors([one, {"a": torch.zeros(2)}])
    assert not same_tensors([one, {}])
