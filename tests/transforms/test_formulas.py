"""What each transform promises of its numbers: maxima after smoothing, order after sorting, spread after turning."""

from __future__ import annotations

import math

import pytest
import torch

from anybit.calibration.parallel import workers
from anybit.calibration.statistics import collect
from anybit.errors import RecipeError
from anybit.methods.activations import IntInputs
from anybit.methods.base import InputStats
from anybit.methods.rtn import RTN
from anybit.models.pairs import scale_pairs
from anybit.transforms.hadamard import Hadamard
from anybit.transforms.heads import query_key_pairs
from anybit.transforms.reorder import Reorder
from anybit.transforms.shift import Shift
from anybit.transforms.smooth import Smooth, largest_weights, per_scale
from anybit.transforms.smooth_attention import SmoothAttention, _holds, layouts, scale
from anybit.transforms.trial import Trial
from transform_case import case


def inputs(found, name):
    """Rows of the input of one linear, float32 [samples * T, K]."""
    seen = []
    handle = found.call.block.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found.outputs()
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])


def apply(transform, found):
    with workers(1) as pool:
        return transform.apply(found.call, found.graph, found.source, pool)


def pairs_of(found):
    return scale_pairs(found.call.block, found.source.read(0), found.call.arguments, found.graph)


NORMS = ("norm",), {"input_layernorm", "post_attention_layernorm"}
OUTPUTS = ("*o_proj", "*down_proj"), {"self_attn.v_proj", "mlp.up_proj"}


@pytest.mark.parametrize(("linears", "producers"), [NORMS, OUTPUTS])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_smoothed_maxima(alpha, linears, producers, tmp_path):
    """A' = (A B)^(1 - alpha), B' = (A B)^alpha for every pair, grouped-query heads too."""
    found = case("llama", tmp_path)
    pairs = [pair for pair in pairs_of(found) if pair.producer in producers]
    assert len(pairs) == 2
    reach = [per_scale(p, inputs(found, p.consumers[0]).abs().amax(0)) for p in pairs]
    spans = [largest_weights(found.call.block, p) for p in pairs]
    apply(Smooth(alpha=alpha, linears=linears), found)
    for pair, a, b in zip(pairs, reach, spans, strict=True):
        after = per_scale(pair, inputs(found, pair.consumers[0]).abs().amax(0))
        torch.testing.assert_close(after, (a * b).pow(1 - alpha), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(largest_weights(found.call.block, pair), (a * b).pow(alpha), rtol=1e-4, atol=1e-6)


def test_smoothing_by_default_is_what_norms_feed(tmp_path):
    found = case("llama", tmp_path)
    notes = apply(Smooth(), found)
    assert [n.split(":")[0].split(".")[-1] for n in notes] == ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]


def test_scales_where_there_is_nothing_or_too_much():
    smooth = Smooth(alpha=0.5)
    s = smooth.scales(torch.tensor([4.0, 0.0, 1e-20]), torch.tensor([1.0, 5.0, 100.0]), 0.5)
    assert s.tolist() == pytest.approx([2.0, 1.0, 1e-5])
    assert smooth.scales(torch.tensor([float("inf"), 1.0]), torch.ones(2), 0.5).tolist() == [1.0, 1.0]
    assert Smooth(alpha=0.5, beta=0.0).scales(torch.tensor([9.0]), torch.tensor([4.0]), 0.5).tolist() == [3.0]


def test_alpha_search_helps_where_it_looks(tmp_path):
    """The block with rounded inputs and weights is nearer to the float block after the search, and nothing is left behind."""
    found = case("llama", tmp_path)
    coarse = {"weights": RTN(bits=6, group_size=-1, symmetric=True), "activations": IntInputs(bits=6)}
    names = [name for name in found.graph.linears if not name.endswith(("o_proj", "down_proj"))]

    def rounded_error():
        saved = {name: found.get(f"{name}.weight").clone() for name in names}
        spec = coarse["activations"].spec()
        for name in names:
            weight = found.get(f"{name}.weight")
            weight.copy_(coarse["weights"].quantize(weight, InputStats())[0].dense())
            found.call.attach(name, lambda x: spec.encode(x.reshape(-1, 64), {}).values().view(x.shape))
        error = sum(float((a - b).square().sum()) for a, b in zip(found.outputs(), found.before, strict=True))
        found.call.detach()
        for name in names:
            found.get(f"{name}.weight").copy_(saved[name])
        return error

    before = rounded_error()
    notes = apply(Smooth(alpha="search", **coarse), found)
    assert len(notes) == 5
    assert found.error() < 1e-4
    assert rounded_error() < 0.8 * before


def test_a_turned_input_has_no_outliers(tmp_path):
    found = case("llama", tmp_path)
    found.get("mlp.up_proj.weight")[7] *= 200  # one hidden unit far above the rest
    found.before = found.outputs()
    x = inputs(found, "mlp.down_proj")
    apply(Hadamard(), found)
    y = inputs(found, "mlp.down_proj")
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-4, atol=1e-5)
    spread = [(z.abs().amax(-1) / z.square().mean(-1).sqrt()).median().item() for z in (x, y)]
    assert spread[0] > 8
    assert spread[1] < 1.1 * math.sqrt(2 * math.log(96))
    assert found.error() < 1e-4


def test_linears_that_share_an_input_turn_together(tmp_path):
    with pytest.raises(RecipeError, match=r"has mlp.gate_proj but not mlp.up_proj"):
        apply(Hadamard(linears=("*gate_proj",)), case("llama", tmp_path))


SORTED = [("llama", "mlp.down_proj", "self_attn.o_proj"), ("gpt2", "mlp.c_proj", "attn.c_proj")]


@pytest.mark.parametrize(("family", "down", "output"), SORTED)
def test_sorted_channels(family, down, output, tmp_path):
    found = case(family, tmp_path)
    apply(Reorder(), found)
    salience = inputs(found, down).abs().amax(0)
    assert torch.equal(salience, salience.sort().values)
    heads = inputs(found, output).abs().amax(0).view(-1, 2 if family == "llama" else 1, 16).amax(1)
    assert torch.equal(heads, heads.sort(-1).values)


def holding(found, pair):
    """Names of the layouts that keep the block when their channels share a factor."""
    return [word for word, ties in layouts(16) if _holds(Trial(found.call, found.source), pair, ties)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt_neox", "phi3", "gpt2", "falcon", "bloom"])
def test_queries_take_the_reach_of_keys(family, tmp_path):
    """After alpha = 1 every (pair of) key channel(s) has reach 1."""
    found = case(family, tmp_path)
    notes = apply(SmoothAttention(alpha=1.0), found)
    assert len(notes) == 1
    tied = "tied" in notes[0]
    assert tied == (family in ("llama", "qwen2", "phi3", "falcon", "gpt_neox"))
    pair = next(p for p in query_key_pairs(found.call.block, found.graph) if holding(found, p))
    assert notes[0].startswith(f"{pair.key}:")
    module = found.call.block.get_submodule(pair.key)
    keys = module(inputs(found, pair.key))[:, pair.key_rows.reshape(-1)].view(-1, *pair.key_rows.shape)
    half = int(notes[0].split("i + ")[1].split()[0]) if tied else 0
    turned = keys[..., : 2 * half].unflatten(-1, (2, half)).square().sum(-2).sqrt() if tied else keys[..., :0]
    reach = torch.cat([turned, keys[..., 2 * half :].abs()], -1).amax(0)
    torch.testing.assert_close(reach, torch.ones_like(reach), rtol=1e-4, atol=1e-4)


def test_untied_channels_of_rope_are_seen(tmp_path):
    found = case("qwen2", tmp_path)
    pair = next(iter(query_key_pairs(found.call.block, found.graph)))
    assert holding(found, pair) == ["channels i and i + 8 tied"]
    assert found.error() == 0.0  # every trial was taken back exactly
    scale(found.call.block, pair, torch.linspace(0.5, 2, 32).view(2, 16))
    assert found.error() > 1e-3


@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt_neox"])
def test_shifted_ranges_lie_around_zero(family, tmp_path):
    found = case(family, tmp_path)
    first = found.graph.groups[0].linears[0]
    before = inputs(found, first)
    notes = apply(Shift(), found)
    assert f"{first}" in [note.split(":")[0] for note in notes]
    after = inputs(found, first)
    assert float((before.amax(0) + before.amin(0)).abs().max()) > 0.5
    assert float((after.amax(0) + after.amin(0)).abs().max()) < 1e-4
    with workers(1) as pool:
        stats = collect(found.call, found.source, [first], frozenset({"range"}), pool)[first]
    assert torch.equal(stats.low, after.amin(0))
    assert torch.equal(stats.high, after.amax(0))


def test_a_model_without_biases_is_not_shifted(tmp_path):
    notes = apply(Shift(), case("llama", tmp_path))
    assert notes
    assert all(note.endswith("not shifted, a bias is missing") for note in notes)
