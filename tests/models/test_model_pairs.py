"""Every scale pair keeps the block, every pair that should be there is there, and wrong ones are not."""

from __future__ import annotations

import pytest
import torch

from anybit.models.graph import block_inputs, run_block, trace_block
from anybit.models.normalize import normalize
from anybit.models.pairs import ScalePair, apply_scale, scale_pairs
from anybit.models.structure import find_structure
from tiny_models import FAMILIES, tiny, token_ids

_V = ("self_attn.v_proj", "linear")
_LLAMA = [("input_layernorm", "norm"), _V, ("post_attention_layernorm", "norm"), ("mlp.up_proj", "linear")]
_GEMMA = [("input_layernorm", "norm1p"), _V, ("pre_feedforward_layernorm", "norm1p"), ("mlp.up_proj", "linear")]
_EXPERTS = [(f"mlp.experts.{e}.gate_up", "linear") for e in range(4)]
_NORMS = [("input_layernorm", "norm"), ("post_attention_layernorm", "norm")]
EXPECTED = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3"), _GEMMA),
    **{key: [*_LLAMA[:3], *_EXPERTS] for key in ("mixtral", "qwen3_moe")},
    "qwen2_moe": [*_LLAMA[:3], ("mlp.shared_expert.up_proj", "linear"), *_EXPERTS],
    "phi3": [_NORMS[0], ("self_attn.qkv_proj", "linear"), _NORMS[1], ("mlp.gate_up_proj", "linear")],
    "opt": [("self_attn_layer_norm", "norm"), _V, ("final_layer_norm", "norm"), ("fc1", "linear")],
    "falcon": [_NORMS[0], ("self_attention.query_key_value", "linear")],
    "gpt_neox": _NORMS,
    "gpt2": [("ln_1", "norm"), ("attn.c_attn", "linear"), ("ln_2", "norm")],
    "bloom": _NORMS,
}


def _first_block(family, **overrides):
    model = tiny(family, **overrides)
    normalize(model)
    blocks = find_structure(model).blocks
    hidden, kwargs = block_inputs(model, blocks, token_ids())[0]
    return model.get_submodule(blocks[0]), hidden, kwargs


@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_keep_the_block(family):
    block, hidden, kwargs = _first_block(family)
    before = {name: parameter.clone() for name, parameter in block.named_parameters()}
    pairs = scale_pairs(block, hidden, kwargs, trace_block(block, hidden, kwargs))
    assert [(pair.producer, pair.producer_kind) for pair in pairs] == EXPECTED[family]
    assert all(torch.equal(parameter, before[name]) for name, parameter in block.named_parameters())

    reference = run_block(block, hidden, kwargs)
    draw = torch.Generator().manual_seed(1)
    for pair in pairs:
        apply_scale(block, pair, 2.0 ** (2 * torch.rand(pair.size, generator=draw) - 1))
        torch.testing.assert_close(run_block(block, hidden, kwargs), reference, rtol=1e-4, atol=1e-4)
        for name in (pair.producer, *pair.consumers):
            assert not torch.equal(block.get_submodule(name).weight, before[f"{name}.weight"]), name


def test_grouped_queries_share_their_scale():
    pair = ScalePair("v", "linear", (0, 4), ("o",), repeat=3, run=2)
    assert pair.columns(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [1, 2, 1, 2, 1, 2, 3, 4, 3, 4, 3, 4]


def test_wrong_row_order_is_seen():
    block, hidden, kwargs = _first_block("llama")
    pairs = scale_pairs(block, hidden, kwargs, trace_block(block, hidden, kwargs))
    value = next(pair for pair in pairs if pair.producer == "self_attn.v_proj")
    reference = run_block(block, hidden, kwargs)
    wrong = ScalePair(value.producer, "linear", value.rows, value.consumers, repeat=2, run=1)
    apply_scale(block, wrong, torch.linspace(0.5, 2.0, value.size))
    assert (run_block(block, hidden, kwargs) - reference).abs().max() > 1e-2


def test_gelu_does_not_commute_but_relu_does():
    for activation, expected in (("relu", True), ("gelu", False)):
        block, hidden, kwargs = _first_block("opt", activation_function=activation)
        pairs = scale_pairs(block, hidden, kwargs, trace_block(block, hidden, kwargs))
        assert ("fc1" in [pair.producer for pair in pairs]) is expected


def test_post_norm_blocks_have_no_norm_pairs():
    block, hidden, kwargs = _first_block("opt", do_layer_norm_before=False)  # the norm's output is the residual too
    pairs = scale_pairs(block, hidden, kwargs, trace_block(block, hidden, kwargs))
    assert [pair.producer for pair in pairs] == ["self_attn.v_proj", "fc1"]


def test_massive_activations_do_not_hide_a_wrong_pair():
    """Real models have them: one channel of the first token is 1e4. There silu is linear (or zero), so for that token
    gate -> down looks right, and its change dwarfs the error of all other tokens."""
    block, hidden, kwargs = _first_block("llama")
    hidden = hidden.clone()
    hidden[0, :, 0] = 0
    hidden[0, 0, 0] = 1e4
    block.self_attn.o_proj.weight[0] = 0  # the other tokens keep their 0 there
    block.mlp.gate_proj.weight[:, 0] = 1e3 * torch.randn(96, generator=torch.Generator().manual_seed(0)).sign()
    producers = [p.producer for p in scale_pairs(block, hidden, kwargs, trace_block(block, hidden, kwargs))]
    assert "mlp.gate_proj" not in producers
    assert "mlp.up_proj" in producers


@pytest.mark.parametrize("bad", [torch.ones(3), torch.zeros(64), torch.full((64,), float("nan"))])
def test_bad_scales_are_refused_before_anything_changes(bad):
    block, _, _ = _first_block("llama")
    before = block.input_layernorm.weight.clone()
    with pytest.raises(ValueError, match="input_layernorm"):
        apply_scale(block, ScalePair("input_layernorm", "norm", (0, 64), ()), bad)
    assert torch.equal(block.input_layernorm.weight, before)
