"""Which linears share an input: spelled out per family."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from anybit.errors import StructureError
from anybit.models.graph import block_inputs, run_block, trace_block
from anybit.models.normalize import normalize
from anybit.models.structure import find_structure
from tiny_models import FAMILIES, tiny, token_ids

_ATTENTION = [
    ("input_layernorm", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    (None, ["self_attn.o_proj"]),
]


def _gated(norm):
    return [*_ATTENTION, (norm, ["mlp.gate_proj", "mlp.up_proj"]), (None, ["mlp.down_proj"])]


def _experts(norm):
    rows = []
    for e in range(4):
        rows += [(norm, [f"mlp.experts.{e}.gate_up"]), (None, [f"mlp.experts.{e}.down"])]
    return rows


def _fused(attention, first, second, up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h"):
    query, out = attention
    return [(first, [query]), (None, [out]), (second, [up]), (None, [down])]


_LLAMA = _gated("post_attention_layernorm")
_SHARED = [
    ("post_attention_layernorm", [f"mlp.{n}" for n in ("shared_expert.gate_proj", "shared_expert.up_proj")]),
    (None, ["mlp.shared_expert.down_proj"]),
]
_SHARED[0][1].append("mlp.shared_expert_gate")
EXPECTED = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3"), _gated("pre_feedforward_layernorm")),
    **{key: [*_ATTENTION, *_experts("post_attention_layernorm")] for key in ("mixtral", "qwen3_moe")},
    "qwen2_moe": [*_ATTENTION, *_SHARED, *_experts("post_attention_layernorm")],
    "phi3": _fused(
        ("self_attn.qkv_proj", "self_attn.o_proj"),
        "input_layernorm",
        "post_attention_layernorm",
        "mlp.gate_up_proj",
        "mlp.down_proj",
    ),
    "opt": [
        ("self_attn_layer_norm", _ATTENTION[0][1]),
        (None, ["self_attn.out_proj"]),
        ("final_layer_norm", ["fc1"]),
        (None, ["fc2"]),
    ],
    "falcon": [
        ("input_layernorm", ["self_attention.query_key_value", "mlp.dense_h_to_4h"]),
        (None, ["self_attention.dense"]),
        (None, ["mlp.dense_4h_to_h"]),
    ],
    "gpt_neox": _fused(("attention.query_key_value", "attention.dense"), "input_layernorm", "post_attention_layernorm"),
    "gpt2": _fused(("attn.c_attn", "attn.c_proj"), "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj"),
    "bloom": _fused(
        ("self_attention.query_key_value", "self_attention.dense"), "input_layernorm", "post_attention_layernorm"
    ),
}


def _first_block(family, tokens=12):
    model = tiny(family)
    normalize(model)
    blocks = find_structure(model).blocks
    hidden, kwargs = block_inputs(model, blocks, token_ids(tokens))[0]
    return model.get_submodule(blocks[0]), hidden, kwargs


@pytest.mark.parametrize("family", FAMILIES)
def test_groups(family):
    block, hidden, kwargs = _first_block(family)
    graph = trace_block(block, hidden, kwargs)
    # order inside a group is the order of the calls; q, k, v may come in any
    found = [(group.norm, sorted(group.linears)) for group in graph.groups]
    assert found == [(norm, sorted(linears)) for norm, linears in EXPECTED[family]]
    linears = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    assert sorted(graph.linears) == sorted(linears)


def test_groups_of_a_mixture_of_experts():
    block, hidden, kwargs = _first_block("mixtral")
    graph = trace_block(block, hidden, kwargs)
    assert [g.expert for g in graph.groups] == [None, None, 0, 0, 1, 1, 2, 2, 3, 3]
    assert graph.readers == (("post_attention_layernorm", "mlp.gate"),)


def test_experts_nobody_visits_are_listed():
    many, hidden, kwargs = _first_block("mixtral")
    one, hidden_one, kwargs_one = _first_block("mixtral", tokens=1)  # 1 token, top 2: two of four experts
    visited = []
    for expert in one.mlp.experts:
        expert.register_forward_hook(lambda *call: visited.append(call))
    assert trace_block(one, hidden_one, kwargs_one) == trace_block(many, hidden, kwargs)
    assert len(visited) == 2


def test_block_inputs_replay_the_model():
    model = tiny("gpt2")  # passes the mask by position
    normalize(model)
    blocks = find_structure(model).blocks
    first, second = block_inputs(model, blocks, token_ids())
    assert torch.equal(run_block(model.get_submodule(blocks[0]), *first), second[0])
    assert not model.get_submodule(blocks[0])._forward_pre_hooks


def test_a_linear_that_does_not_run():
    block, hidden, kwargs = _first_block("llama")
    block.spare = nn.Linear(64, 64)
    with pytest.raises(StructureError, match="spare did not run"):
        trace_block(block, hidden, kwargs)
