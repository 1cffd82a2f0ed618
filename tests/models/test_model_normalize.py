"""Normalizing real models keeps their function; fused experts of an unknown kind are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from anybit.errors import StructureError
from anybit.models.normalize import LoopedExperts, normalize
from tiny_models import logits, tiny, token_ids


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "qwen2_moe", "qwen3_moe"])
def test_function_is_kept(family):
    model = tiny(family)
    before = logits(model, token_ids())
    normalize(model)
    torch.testing.assert_close(logits(model, token_ids()), before, rtol=1e-5, atol=1e-5)
    assert not [m for m in model.modules() if isinstance(m, Conv1D)]
    assert all(p.dim() < 3 for p in model.parameters())


def test_expert_names():
    model = tiny("mixtral")
    normalize(model)
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, LoopedExperts)
    names = [name for name, module in experts.named_modules() if isinstance(module, nn.Linear)]
    assert names == [f"{e}.{part}" for e in range(4) for part in ("gate_up", "down")]


def test_sentinel_index_adds_nothing():
    model = tiny("mixtral")
    normalize(model)
    experts = model.model.layers[0].mlp.experts
    hidden = torch.randn(3, 64)
    weights = torch.full((3, 2), 0.5)
    both = experts(hidden, torch.tensor([[0, 1], [2, 3], [1, 4]]), weights)
    assert torch.allclose(both[2], 0.5 * experts[1](hidden[2]), atol=1e-6)
    assert not torch.allclose(both[0], 0.5 * experts[0](hidden[0]), atol=1e-3)


class _Fused(nn.Module):
    """Fused experts whose gate is clamped: the shapes are right, the formula is not."""

    def __init__(self, gate_up=(2, 16, 4), down=(2, 4, 8)):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(gate_up))
        self.down_proj = nn.Parameter(torch.randn(down))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for token in range(hidden_states.shape[0]):
            for slot, expert in enumerate(top_k_index[token].tolist()):
                gate, up = (self.gate_up_proj[expert] @ hidden_states[token]).chunk(2)
                value = self.down_proj[expert] @ (self.act_fn(self.clamp(gate)) * up)
                out[token] += top_k_weights[token, slot] * value
        return out

    def clamp(self, gate):
        return gate.clamp(max=1.0)


class _Plain(_Fused):
    def clamp(self, gate):
        return gate


def test_unknown_formula_is_refused():
    model = nn.Sequential(_Fused())
    with pytest.raises(StructureError, match="0: experts _Fused compute something other"):
        normalize(model)
    normalize(nn.Sequential(_Plain()))  # and the same without the clamp is fine


def test_transposed_experts_are_refused():
    with pytest.raises(StructureError, match="known: gate_up_proj"):
        normalize(nn.Sequential(_Plain((2, 4, 16), (2, 8, 4))))


def test_biased_experts_are_refused():
    fused = _Plain()
    fused.gate_up_proj_bias = nn.Parameter(torch.zeros(2, 16))
    with pytest.raises(StructureError, match="gate_up_proj_bias"):
        normalize(nn.Sequential(fused))
