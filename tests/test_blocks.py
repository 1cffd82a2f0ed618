"""One block, quantized: each group on inputs made by quantized predecessors, stacked or alone, table by table."""

from __future__ import annotations

import copy

import pytest
import torch

import anybit
from anybit import blocks, pipeline
from anybit.calibration.activations import Activations
from anybit.calibration.parallel import workers
from anybit.calibration.statistics import BlockCall
from anybit.errors import CalibrationError
from anybit.formats.terms import dense, load_terms
from anybit.methods.base import InputStats
from anybit.methods.gptq import GPTQ
from anybit.methods.rtn import RTN
from anybit.models.graph import block_inputs, trace_block
from anybit.models.normalize import normalize
from anybit.models.structure import find_structure
from anybit.recipe import Assignment
from tiny_checkpoints import quantize_tiny
from tiny_models import tiny, token_ids

SAMPLES, TOKENS = 4, 24
KEPT = "self_attn.v_proj"
READ = {"self_attn.q_proj", "self_attn.k_proj"}  # they share their input with the keys, so the first token weighs more


def first_block(tmp_path, family="llama"):
    """A block, its graph, arguments and hidden states on disk."""
    model = tiny(family)
    normalize(model)
    name = find_structure(model).blocks[0]
    source = Activations(tmp_path / "hidden", SAMPLES, TOKENS, 64)
    for sample in range(SAMPLES):
        hidden, kwargs = block_inputs(model, [name], token_ids(TOKENS, seed=sample))[0]
        source.write(sample, hidden)
    block = model.get_submodule(name)
    return block, trace_block(block, source.read(0), kwargs), kwargs, source


def method_of(name):
    """Two different methods in one group, one linear left out."""
    bits = {"self_attn.k_proj": 4, "mlp.up_proj": 4}.get(name, 3)
    return None if name == KEPT else GPTQ(bits=bits, group_size=16, first_token_weight=50)


def oracle(block, graph, kwargs, source):
    """The same by the definition, one linear after the other, statistics in float64; weights and errors by name."""
    found = {}
    for group in graph.groups:
        seen = []
        hook = block.get_submodule(group.linears[0]).register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0][0].double())
        )
        for sample in range(SAMPLES):
            block(source.read(sample), **kwargs)
        hook.remove()
        weights = torch.ones(TOKENS, dtype=torch.float64)
        weights[0] = 50 if READ & set(group.linears) else 1
        hessian = sum(2 * x.t() @ (x * weights[:, None]) for x in seen) / (SAMPLES * weights.sum())
        for name in group.linears:
            if (method := method_of(name)) is None:
                continue
            weight = block.get_submodule(name).weight
            new = dense(method.quantize(weight.clone(), InputStats(SAMPLES * TOKENS, hessian.float())))
            lost, size = (((w.double() @ hessian) * w).sum() for w in ((weight - new), weight))
            found[name] = new, float((lost / size).sqrt())
        for name in group.linears:  # only now: the group saw one input
            if name in found:
                block.get_submodule(name).weight.copy_(found[name][0])
    return found


def test_every_group_sees_what_quantized_predecessors_make(tmp_path):
    block, graph, kwargs, source = first_block(tmp_path)
    wanted = oracle(copy.deepcopy(block), graph, kwargs, source)
    kept = block.get_submodule(KEPT).weight.clone()
    methods = {f"m.0.{name}": method_of(name) for name in graph.linears}
    with workers(2) as pool:
        done = blocks.quantize_block(
            "m.0", BlockCall(block, kwargs), graph, source, Assignment((), methods), pool, False
        )
    assert {item.name.removeprefix("m.0.") for item in done} == set(wanted)
    for item in done:
        name = item.name.removeprefix("m.0.")
        weight, error = wanted[name]
        own = dense(load_terms(item.form, item.tensors))
        assert torch.equal(block.get_submodule(name).weight, own)  # the block goes on with what is saved
        # float32 statistics may tip a rounding here and there; other statistics move a tenth of all weights
        assert float((own != weight).float().mean()) < 0.01, name
        assert item.row.error == pytest.approx(error, rel=0.02), name
        assert item.row.calibration_tokens == SAMPLES * TOKENS
        assert item.row.name == item.name
    assert torch.equal(block.get_submodule(KEPT).weight, kept)


def test_experts_go_first_groups_before_second(tmp_path):
    _, graph, _, _ = first_block(tmp_path, "mixtral")
    found = [[group.linears for group in stage] for stage in blocks.stages(graph)]
    assert found[2] == [(f"mlp.experts.{e}.gate_up",) for e in range(4)]
    assert found[3] == [(f"mlp.experts.{e}.down",) for e in range(4)]
    assert len(found) == 4


@pytest.mark.parametrize("method", [RTN(bits=3, group_size=16), RTN(bits=8, group_size=24, symmetric=True)])
def test_a_table_in_pieces_is_the_table(monkeypatch, method):
    table = torch.randn(37, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = blocks.quantize_table("embed", table, method)
    monkeypatch.setattr(blocks, "CHUNK_WEIGHTS", 64 * 5)
    pieces = blocks.quantize_table("embed", table, method)
    assert pieces.form == whole.form
    assert pieces.row.sha256 == whole.row.sha256
    own = dense(load_terms(pieces.form, pieces.tensors))
    assert torch.equal(own, dense(method.quantize(table.float(), InputStats())))
    error = float((own - table.float()).norm() / table.float().norm())
    assert pieces.row.error == pytest.approx(error, rel=1e-5)
    assert pieces.row.error == pytest.approx(whole.row.error, rel=1e-5)
    assert (pieces.row.calibration_tokens, pieces.row.stored_bytes) == (0, whole.row.stored_bytes)


def test_a_table_has_no_calibration():
    with pytest.raises(CalibrationError, match=r"embed: method 'gptq' needs calibration"):
        blocks.quantize_table("embed", torch.randn(3, 64), GPTQ())


def test_later_blocks_see_what_earlier_ones_became(tmp_path, monkeypatch):
    """The hidden states that enter block 1 in calibration are those of the finished checkpoint."""
    entered, real, runs = {}, pipeline.quantize_block, []

    def spy(name, call, graph, source, *rest):
        entered[name] = source.read(0)
        return real(name, call, graph, source, *rest)

    class Spy(pipeline.Run):
        def __init__(self, *args):
            super().__init__(*args)
            runs.append(self)

    monkeypatch.setattr(pipeline, "quantize_block", spy)
    monkeypatch.setattr(pipeline, "Run", Spy)
    out = quantize_tiny("llama", tmp_path, "gptq-w4", overrides=["weights.bits=2"])
    model = anybit.load(out)
    names = find_structure(tiny("llama")).blocks
    for name, (hidden, _) in zip(names, block_inputs(model, names, runs[0].tokens[:1]), strict=True):
        torch.testing.assert_close(entered[name], hidden, rtol=1e-4, atol=1e-4)
