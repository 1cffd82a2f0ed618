"""Streamed statistics against X itself, in float64; the same bits however the work is cut."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from anybit.calibration.activations import Activations
from anybit.calibration.parallel import workers
from anybit.calibration.statistics import SAMPLED_ROWS, BlockCall, collect, propagate
from anybit.models.graph import block_inputs, read_by_other_tokens
from anybit.models.normalize import normalize
from anybit.models.structure import find_structure
from tiny_models import tiny, token_ids

SAMPLES, TOKENS, WIDTH, INNER = 5, 7, 300, 40  # wider than a strip of the Hessian
ALL = frozenset({"hessian", "inputs", "mean_abs"})


class Block(nn.Module):
    """Two linears in a row and one that reads nothing; like many blocks it returns a tuple."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.idle = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH), nn.Linear(4, 4)
        self.runs = 0

    def forward(self, hidden, gain):
        self.runs += 1
        return hidden + self.down(self.up(hidden * gain).relu()), None


@pytest.fixture
def hidden():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, TOKENS, WIDTH, generator=draw)
    x[:, 0] *= 9  # the first token of a sample stands out, as it does in real models
    return x


@pytest.fixture
def source(tmp_path, hidden):
    found = Activations(tmp_path / "hidden", SAMPLES, TOKENS, WIDTH)
    for sample, record in enumerate(hidden):
        found.write(sample, record[None])
    return found


@pytest.fixture
def block():
    torch.manual_seed(1)
    return Block().requires_grad_(False)


def statistics(block, source, needs=ALL, threads=2, in_flight=2, **options):
    with workers(threads) as pool:
        call = BlockCall(block, {"gain": 2.0}, in_flight)
        return collect(call, source, options.pop("linears", ["up", "down"]), needs, pool, **options)


def inputs_of(block, hidden):
    """X of both linears, float64 [samples, T, K]."""
    up = hidden.double() * 2
    return {"up": up, "down": (up @ block.up.weight.double().t() + block.up.bias.double()).relu()}


def test_against_the_definition(block, source, hidden):
    found = statistics(block, source)
    for name, x in inputs_of(block, hidden).items():
        flat, stats = x.flatten(0, 1), found[name]
        assert stats.tokens == SAMPLES * TOKENS
        torch.testing.assert_close(stats.hessian.double(), 2 / len(flat) * flat.t() @ flat, rtol=2e-5, atol=2e-4)
        torch.testing.assert_close(stats.mean_abs.double(), flat.abs().mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stats.inputs.double(), flat, rtol=1e-5, atol=1e-4)  # few rows: all are kept


def test_first_token_counts_as_many(block, source, hidden):
    found, plain = statistics(block, source, first_token={"up": 25.0}), statistics(block, source)
    x = inputs_of(block, hidden)["up"]
    weight = torch.ones(TOKENS, dtype=torch.float64)
    weight[0] = 25
    oracle = 2 * torch.einsum("stk,t,stl->kl", x, weight, x) / (SAMPLES * weight.sum())
    torch.testing.assert_close(found["up"].hessian.double(), oracle, rtol=2e-5, atol=2e-3)
    assert torch.equal(found["down"].hessian, plain["down"].hessian)
    assert found["up"].tokens == SAMPLES * TOKENS
    assert torch.equal(found["up"].mean_abs, plain["up"].mean_abs)
    assert torch.equal(found["up"].inputs, plain["up"].inputs)


def test_first_token_left_out_of_everything(block, source, hidden):
    needs = ALL | {"max_abs"}
    found, plain = statistics(block, source, needs, first_token={"up": 0.0}), statistics(block, source, needs)
    x = inputs_of(block, hidden)["up"][:, 1:]
    flat, stats = x.flatten(0, 1), found["up"]
    assert stats.tokens == len(flat)
    torch.testing.assert_close(stats.hessian.double(), 2 / len(flat) * flat.t() @ flat, rtol=2e-5, atol=2e-4)
    torch.testing.assert_close(stats.mean_abs.double(), flat.abs().mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.sample_max.double(), x.abs().amax(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.inputs.double(), flat, rtol=1e-5, atol=1e-4)
    assert torch.equal(found["down"].sample_max, plain["down"].sample_max)


def test_same_bits_however_the_work_is_cut(block, source):
    first = statistics(block, source, threads=1, in_flight=1)
    for threads, in_flight in [(1, 4), (2, 2), (2, 3), (3, 1), (3, 4), (1, 9)]:
        found = statistics(block, source, threads=threads, in_flight=in_flight)
        for name, stats in first.items():
            for part in ALL:
                assert torch.equal(getattr(found[name], part), getattr(stats, part)), (threads, in_flight, name, part)


def test_rows_are_an_even_sample_of_every_sample(block, tmp_path):
    tokens = SAMPLED_ROWS  # more than may be kept of each
    source = Activations(tmp_path / "many", 2, tokens, WIDTH)
    for sample in range(2):  # every row is its own number
        source.write(sample, (torch.arange(tokens) + tokens * sample)[None, :, None].expand(1, tokens, WIDTH).float())
    kept = statistics(block, source, frozenset({"inputs"}), linears=["up"])["up"].inputs[:, 0] / 2
    assert len(kept) == SAMPLED_ROWS
    for sample in range(2):
        own = kept[(kept >= sample * tokens) & (kept < (sample + 1) * tokens)] - sample * tokens
        assert len(own) == SAMPLED_ROWS // 2
        assert (own.min(), own.max()) == (0, tokens - 1)
        assert own.diff().max() <= 3


def test_only_what_is_asked_for(block, source):
    found = statistics(block, source, frozenset({"mean_abs"}))["up"]
    assert (found.hessian, found.inputs) == (None, None)
    assert found.mean_abs is not None
    assert statistics(block, source, frozenset())["up"].tokens == SAMPLES * TOKENS


def test_a_linear_nobody_reached_has_no_tokens(block, source):
    found = statistics(block, source, linears=["up", "idle"])
    assert found["idle"].tokens == 0
    assert found["idle"].inputs is None
    assert found["up"].tokens == SAMPLES * TOKENS


def test_the_block_ends_at_the_last_wanted_linear_and_is_left_clean(block, source):
    later = []
    block.down.register_forward_hook(lambda *call: later.append(call))
    statistics(block, source, linears=["up"])
    assert block.runs == SAMPLES
    assert later == []
    assert not block.up._forward_pre_hooks


def test_an_error_in_the_block_is_not_swallowed_and_hooks_go(block, source):
    with pytest.raises(TypeError), workers(2) as pool:
        collect(BlockCall(block, {}), source, ["up"], ALL, pool)
    assert not block.up._forward_pre_hooks


@pytest.mark.parametrize("threads", [1, 3])
def test_propagate(block, source, hidden, tmp_path, threads):
    target = Activations(tmp_path / "next", SAMPLES, TOKENS, WIDTH)
    with workers(threads) as pool:
        propagate(BlockCall(block, {"gain": 2.0}), source, target, pool)
    x = inputs_of(block, hidden)["down"]
    expected = hidden.double() + x @ block.down.weight.double().t() + block.down.bias.double()
    for sample in range(SAMPLES):
        torch.testing.assert_close(target.read(sample).double(), expected[sample][None], rtol=1e-5, atol=1e-4)


def first_block(family, tokens=12):
    model = tiny(family)
    normalize(model)
    blocks = find_structure(model).blocks
    hidden, kwargs = block_inputs(model, blocks, token_ids(tokens))[0]
    return model.get_submodule(blocks[0]), hidden, kwargs


@pytest.mark.parametrize(("tokens", "in_flight", "order"), [(12, 1, 1), (12, 3, -1), (1, 2, 1)])
def test_experts_count_the_tokens_that_were_sent_to_them(tmp_path, tokens, in_flight, order):
    block, _, kwargs = first_block("mixtral", tokens)
    source = Activations(tmp_path / "hidden", 3, tokens, 64)
    draw = torch.Generator().manual_seed(0)
    for sample in range(3):
        source.write(sample, torch.randn(1, tokens, 64, generator=draw))
    sent = []
    experts = block.mlp.experts
    hook = experts.register_forward_pre_hook(lambda _, args: sent.append((args[0].clone(), args[1].clone())))
    for sample in range(3):
        block(source.read(sample), **kwargs)
    hook.remove()
    names = [f"mlp.experts.{e}.{part}" for e in range(4)[::order] for part in ("gate_up", "down")]
    with workers(2) as pool:
        found = collect(BlockCall(block, kwargs, in_flight), source, names, ALL, pool)
    for e in range(4):
        x = torch.cat([states[(picks == e).any(-1)] for states, picks in sent]).double()
        stats = found[f"mlp.experts.{e}.gate_up"]
        assert stats.tokens == found[f"mlp.experts.{e}.down"].tokens == len(x)
        if len(x):
            torch.testing.assert_close(stats.hessian.double(), 2 / len(x) * x.t() @ x, rtol=1e-4, atol=1e-4)
    assert sum(found[f"mlp.experts.{e}.gate_up"].tokens for e in range(4)) == 3 * tokens * 2


READ = {
    "llama": ("self_attn.k_proj self_attn.v_proj", "self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj self_attn.q_proj"),
    "gemma3": ("self_attn.k_proj self_attn.v_proj", "self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"),
    "gpt2": ("attn.c_attn", "attn.c_proj mlp.c_fc mlp.c_proj"),
    "falcon": ("self_attention.query_key_value", "self_attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h"),
}  # fmt: skip


@pytest.mark.parametrize("family", READ)
def test_whose_outputs_other_tokens_read(family):
    block, hidden, kwargs = first_block(family)
    read, own = (names.split() for names in READ[family])
    assert [name for name in [*read, *own] if read_by_other_tokens(block, hidden, kwargs, [name])] == read
    assert read_by_other_tokens(block, hidden, kwargs, [own[0], read[0]])
    assert not any(module._forward_hooks for module in block.modules())
