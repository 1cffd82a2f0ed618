"""The residual stream in another basis: every block gives what it gave, turned; and what cannot be turned says why."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from anybit.calibration.parallel import workers
from anybit.errors import StructureError
from anybit.models.structure import is_norm
from anybit.transforms.hadamard import Hadamard
from anybit.transforms.reorder import Reorder
from anybit.transforms.rotate import Ends, Rotate, is_centred
from anybit.transforms.smooth import Smooth
from anybit.transforms.smooth_attention import SmoothAttention
from anybit.transforms.stream import Stream, gain_of
from tiny_models import _GATED, FAMILIES
from transform_case import case

POST = ("gemma2", "gemma3")


@pytest.fixture(autouse=True)
def gemma(monkeypatch):
    """The first Gemma norms before only, with gains 1 + weight."""
    monkeypatch.setitem(FAMILIES, "gemma", lambda: tf.GemmaConfig(**_GATED, head_dim=16))


def turned(found, rotate):
    """Puts the inputs in the new basis, and returns what the outputs have to be there."""
    stream = rotate.stream(64, is_centred(found.call.block, 64))
    for i in range(found.source.samples):
        found.source.write(i, stream.turn(found.source.read(i)).float())
    return [stream.turn(before).float() for before in found.before]


@pytest.mark.parametrize("rotate", [Rotate(values=True), Rotate(signs=False)], ids=["random", "plain"])
@pytest.mark.parametrize("family", ["gemma", *(f for f in FAMILIES if f not in POST)])
def test_a_block_turns(family, rotate, tmp_path):
    found = case(family, tmp_path)
    expected = turned(found, rotate)
    with workers(1) as pool:
        rotate.apply(found.call, found.graph, found.source, pool)
    assert found.error(expected) < 1e-4
    for name, module in found.call.block.named_modules():
        if is_norm(module) and module.weight.numel() == 64 and not isinstance(module, torch.nn.LayerNorm):
            assert torch.equal(gain_of(module)[0], torch.ones(64, dtype=torch.float64)), name


@pytest.mark.parametrize("family", ["llama", "gemma", "qwen2", "mixtral", "opt"])
def test_everything_after_a_rotation(family, tmp_path):
    found = case(family, tmp_path)
    expected = turned(found, Rotate())
    with workers(1) as pool:
        for transform in (
            Rotate(values=True),
            Reorder(),
            SmoothAttention(),
            Smooth(linears=("*",), alpha=0.2),
            Hadamard(),
        ):
            transform.apply(found.call, found.graph, found.source, pool)
    assert found.error(expected) < 1e-4


@pytest.mark.parametrize("family", POST)
def test_post_norms_are_named(family, tmp_path):
    found = case(family, tmp_path)
    turned(found, Rotate())
    with (
        workers(1) as pool,
        pytest.raises(StructureError, match=r"post_attention_layernorm, post_feedforward_layernorm"),
    ):
        Rotate().apply(found.call, found.graph, found.source, pool)


def test_a_layer_norm_needs_its_own_rotation(tmp_path, monkeypatch):
    """The basis of an RMS norm moves the mean; that the block is checked shows it."""
    found = case("opt", tmp_path)
    monkeypatch.setattr("anybit.transforms.rotate.is_centred", lambda *_: False)
    stream = Rotate().stream(64, centred=False)
    for i in range(found.source.samples):
        found.source.write(i, stream.turn(found.source.read(i)).float())
    with workers(1) as pool, pytest.raises(StructureError, match="its output changes under rotation"):
        Rotate().apply(found.call, found.graph, found.source, pool)


@pytest.mark.parametrize("width", [64, 96, 576, 2304, 24 * 13])
@pytest.mark.parametrize("centred", [False, True])
def test_the_basis(width, centred):
    stream = Stream.of(width, centred, random=True, seed=1)
    basis = stream.turn(torch.eye(width))
    torch.testing.assert_close(basis @ basis.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(stream.back(x), x @ basis.T)
    torch.testing.assert_close(stream.back(stream.turn(x)), x)
    ones = torch.ones(width, dtype=torch.float64)
    assert torch.allclose(stream.turn(ones), ones) is centred
    x[:, 3] = 1000.0
    y = stream.turn(x)
    assert float((y.abs().amax(-1) / y.square().mean(-1).sqrt()).max()) < 6.5 if width != 24 * 13 else True


def test_what_stands_before_the_blocks():
    ends = Ends(Rotate().stream(64, centred=False))
    table = torch.nn.Embedding(10, 64)
    before = table.weight.detach().clone()
    ends.enter("embed", table)
    torch.testing.assert_close(table.weight.norm(dim=-1), before.norm(dim=-1))
    assert not torch.allclose(table.weight, before)
    ends.enter("rotary", torch.nn.Identity())
    with pytest.raises(StructureError, match="embed_norm stands before the blocks"):
        ends.enter("embed_norm", torch.nn.LayerNorm(64))


def test_a_gain_of_zero_cannot_keep_a_bias(tmp_path):
    found = case("falcon", tmp_path)  # layer norms with biases, linears without
    turned(found, Rotate())
    found.get("input_layernorm.weight")[5] = 0.0
    with workers(1) as pool, pytest.raises(StructureError, match="gain of 0 with a bias"):
        Rotate().apply(found.call, found.graph, found.source, pool)
