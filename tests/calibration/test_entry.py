"""What the weightless way in says about the blocks is what the whole model does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from anybit.calibration.entry import Entry
from anybit.models.graph import block_inputs, run_block
from anybit.models.normalize import normalize
from anybit.models.skeleton import release
from anybit.models.structure import find_structure
from tiny_models import FAMILIES, logits, tiny, token_ids


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or a == b


@pytest.fixture(params=FAMILIES)
def model(request):
    found = tiny(request.param)
    normalize(found)
    return found


@pytest.mark.parametrize("tokens", [1, 20])  # 20: beyond the tiny sliding windows
def test_entry_is_what_the_model_does(model, tokens):
    ids, blocks = token_ids(tokens), find_structure(model).blocks
    calls, expected = block_inputs(model, blocks, ids), logits(model, ids)
    last = run_block(model.get_submodule(blocks[-1]), *calls[-1])
    for name in blocks:
        release(model.get_submodule(name))  # blocks need no weights from here on
    entry = Entry(model, blocks)
    assert torch.equal(entry.hidden(ids[0]), calls[0][0])
    arguments = entry.arguments(ids[0])
    assert len(arguments) == len(blocks)
    for found, (_, wanted) in zip(arguments, calls, strict=True):
        assert found.keys() == wanted.keys()
        for name in wanted:
            assert same(found[name], wanted[name]), name
    assert torch.equal(entry.logits(ids[0], last), expected[0])


def test_arguments_follow_the_number_of_tokens_and_are_computed_once():
    model = tiny("gpt2")
    entry = Entry(model, find_structure(model).blocks)
    first = entry.arguments(token_ids(5)[0])
    assert entry.arguments(token_ids(5, seed=1)[0]) is first
    assert entry.arguments(token_ids(6)[0]) is not first
    assert entry.arguments(token_ids(5)[0]) is first


def test_the_model_is_whole_again_also_after_a_failure():
    model = tiny("llama")
    names = find_structure(model).blocks
    blocks = [model.get_submodule(name) for name in names]
    entry = Entry(model, names)
    entry.hidden(token_ids()[0])
    assert [model.get_submodule(name) for name in names] == blocks
    model.model.norm = nn.Identity()
    model.lm_head = nn.Linear(3, 3)  # does not fit
    with pytest.raises(RuntimeError):
        entry.logits(token_ids()[0], torch.zeros(1, 12, 64))
    assert [model.get_submodule(name) for name in names] == blocks
