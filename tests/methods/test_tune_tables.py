"""Training of tables on a block's output: what moves, what stays, that it helps, and that it is dropped when it does not."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import yaml

from anybit.blocks import quantize_block
from anybit.calibration.activations import Activations
from anybit.calibration.parallel import workers
from anybit.calibration.statistics import BlockCall, propagate
from anybit.errors import RecipeError
from anybit.formats.planes import unpack
from anybit.formats.terms import dense, load_terms
from anybit.methods.any_precision import AnyPrecision
from anybit.methods.anybcq import AnyBCQ
from anybit.methods.base import InputStats
from anybit.methods.rtn import RTN
from anybit.methods.tune_tables import Tunable, TuneTables, finest_steps, tunable
from anybit.models.graph import block_inputs, trace_block
from anybit.models.normalize import normalize
from anybit.models.structure import find_structure
from anybit.recipe import Assignment, Entry, load_recipe
from anybit.tune_block import tune_block
from tiny_checkpoints import quantize_tiny
from tiny_models import tiny, token_ids

SAMPLES, TOKENS = 4, 24
BCQ = AnyBCQ(bits=4, group_size=32, precisions=[2, 3, 4])
BOOK = AnyPrecision(bits=4, seed_bits=2, sensitivity="hessian")


def term_of(method, seed=0):
    weight = torch.randn(6, 80, generator=torch.Generator().manual_seed(seed))
    return method.quantize(weight, InputStats(1, torch.eye(80)))[0]


@pytest.mark.parametrize("method", [BCQ, BOOK], ids=["binary-coded", "codebook"])
@pytest.mark.parametrize("bits", [2, 4])
def test_a_tunable_starts_as_its_term_and_gradients_reach_every_table(method, bits):
    term = term_of(method)
    moving = Tunable(term, unpack(term.planes, 80), bits)
    assert torch.equal(moving.dense(), term.dense(bits))
    assert set(moving.shifts) == set(finest_steps(term.decoder, bits))
    direction = torch.randn(6, 80, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((moving.dense() * direction).sum(), list(moving.shifts.values()))
    for key, shift in moving.shifts.items():  # a finite difference of one random entry
        at = tuple(int(n * 0.7) for n in shift.shape)
        with torch.no_grad():
            shift[at] += 1
        change = float(((moving.dense().detach() - term.dense(bits)) * direction).sum())
        own = float(gradients[list(moving.shifts).index(key)][at])
        assert change == pytest.approx(own, rel=1e-3, abs=1e-4)
        with torch.no_grad():
            shift[at] -= 1
    with torch.no_grad():
        for shift in moving.shifts.values():
            shift += 0.3
    rounded = moving.rounded()
    assert torch.equal(rounded.planes, term.planes)
    torch.testing.assert_close(rounded.dense(bits), moving.dense().detach(), rtol=2e-3, atol=2e-3)
    others = [p for p in term.decoder.precisions if p != bits]
    assert all(torch.equal(rounded.dense(p), term.dense(p)) for p in others)
    assert not torch.equal(rounded.dense(bits), term.dense(bits))


def test_only_float_tables_of_a_held_precision_are_tunable():
    assert tunable(term_of(BCQ), 3)
    assert not tunable(term_of(AnyBCQ(bits=4, precisions=[2, 4])), 3)
    assert not tunable(RTN().quantize(torch.randn(4, 64), InputStats())[0], 4)


def quantized_block(tmp_path, method, skip=()):
    """A block whose linears (but `skip`, which get RTN) went through `method`; its call, inputs, float outputs, entries."""
    model = tiny("llama")
    normalize(model)
    name = find_structure(model).blocks[0]
    source, targets = (Activations(tmp_path / what, SAMPLES, TOKENS, 64) for what in ("hidden", "targets"))
    for sample in range(SAMPLES):
        hidden, kwargs = block_inputs(model, [name], token_ids(TOKENS, seed=sample))[0]
        source.write(sample, hidden)
    call = BlockCall(model.get_submodule(name), kwargs)
    graph = trace_block(call.block, source.read(0), kwargs)
    methods = {f"m.0.{n}": RTN(bits=4) if n in skip else method for n in graph.linears}
    with workers(1) as pool:
        propagate(call, source, targets, pool)
        done = quantize_block("m.0", call, graph, source, Assignment((), methods), pool, False)
    return call, source, targets, done


def block_error(call, source, targets, done, bits):
    """The definition, after putting `done` at `bits` into the block."""
    with torch.no_grad():
        for item in done:
            weight = call.block.get_parameter(f"{item.name.removeprefix('m.0.')}.weight")
            nested = "precisions" in item.form["terms"][0]
            weight.copy_(dense(load_terms(item.form, item.tensors), bits if nested else None))
        lost = [(call.run(source.read(s)) - targets.read(s)).square().sum() for s in range(SAMPLES)]
        return float(sum(lost) / sum(targets.read(s).square().sum() for s in range(SAMPLES)))


@pytest.mark.parametrize("method", [BCQ, BOOK], ids=["binary-coded", "codebook"])
def test_training_lowers_the_blocks_error_and_keeps_the_planes(tmp_path, method):
    call, source, targets, before = quantized_block(tmp_path, method, skip=("self_attn.v_proj",))
    results = []
    for threads in (1, 2):
        with workers(threads) as pool:
            results.append(tune_block("m.0", call, source, targets, TuneTables(highest=3), before, pool))
        for item in results[-1]:
            weight = call.block.get_parameter(f"{item.name.removeprefix('m.0.')}.weight")
            assert torch.equal(weight, dense(load_terms(item.form, item.tensors)))  # the stream keeps its precision
    after = results[0]
    assert [a.row.sha256 for a in after] == [b.row.sha256 for b in results[1]]
    for old, new in zip(before, after, strict=True):
        assert new.form == old.form
        changed = {key for key in old.tensors if not torch.equal(old.tensors[key], new.tensors[key])}
        moving = {"alpha2", "alpha3", "offset2", "offset3"} if method is BCQ else {"table2", "table3"}
        assert changed == (set() if "v_proj" in old.name else moving)
        assert all(new.row.sha256[key] != old.row.sha256[key] for key in changed)
        assert [note.split(" bits")[0] for note in new.row.notes] == ["2", "3"]
    for bits in (2, 3):
        was, now = (block_error(call, source, targets, done, bits) for done in (before, after))
        assert now < 0.97 * was
        assert f"{was:.4g} -> {now:.4g}" in after[0].row.notes[bits - 2]


def test_training_is_adam_on_the_mean_squared_error(tmp_path):
    """Step by step the same as autograd through the whole block, one parameter list, samples one after the other."""
    call, source, targets, before = quantized_block(tmp_path, BCQ)
    names = [item.name.removeprefix("m.0.") for item in before]
    terms = [load_terms(item.form, item.tensors)[0] for item in before]
    moving = [Tunable(term, unpack(term.planes, term.shape[1]), 2) for term in terms]
    optimizer = torch.optim.Adam([shift for one in moving for shift in one.shifts.values()], lr=0.1)
    for step in range(4):  # two epochs of two batches
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 4)
        optimizer.zero_grad()
        loss = torch.zeros(())
        for sample in range(2 * (step % 2), 2 * (step % 2) + 2):
            weights = {f"{name}.weight": one.dense() for name, one in zip(names, moving, strict=True)}
            out = torch.func.functional_call(call.block, weights, (source.read(sample),), call.arguments)
            out = out if isinstance(out, torch.Tensor) else out[0]
            loss = loss + (out - targets.read(sample)).square().mean()
        loss.backward()
        optimizer.step()
    with workers(2) as pool:
        after = tune_block("m.0", call, source, targets, TuneTables(highest=2, lr=0.1, batch=2), before, pool)
    for one, term, item in zip(moving, terms, after, strict=True):
        wanted, own = one.rounded().dense(2), load_terms(item.form, item.tensors)[0].dense(2)
        # Adam's first steps have the size of the rate whatever the gradient, so one that is 0 but for rounding may differ.
        moved = (wanted - term.dense(2)).abs().mean()
        assert float((own - wanted).abs().mean()) < 0.02 * float(moved)


def test_training_that_does_not_help_is_dropped(tmp_path):
    call, source, targets, before = quantized_block(tmp_path, BCQ)
    with workers(1) as pool:
        after = tune_block("m.0", call, source, targets, TuneTables(highest=2, lr=100.0), before, pool)
    assert "left as they were" in after[0].row.notes[0]
    for old, new in zip(before, after, strict=True):
        assert new.row.sha256 == old.row.sha256
        weight = call.block.get_parameter(f"{new.name.removeprefix('m.0.')}.weight")
        assert torch.equal(weight, dense(load_terms(new.form, new.tensors)))


def test_a_stream_at_another_precision_stays_there(tmp_path):
    call, source, targets, done = quantized_block(tmp_path, BCQ)
    with torch.no_grad():
        for item in done:
            weight = call.block.get_parameter(f"{item.name.removeprefix('m.0.')}.weight")
            weight.copy_(dense(load_terms(item.form, item.tensors), 2))
    with workers(1) as pool:
        after = tune_block("m.0", call, source, targets, TuneTables(highest=2), done, pool)
    for item in after:
        weight = call.block.get_parameter(f"{item.name.removeprefix('m.0.')}.weight")
        assert torch.equal(weight, dense(load_terms(item.form, item.tensors), 2))


def test_nothing_to_tune_is_an_error(tmp_path):
    call, source, targets, done = quantized_block(tmp_path, RTN())
    with workers(1) as pool, pytest.raises(RecipeError, match="no linear has float tables"):
        tune_block("m.0", call, source, targets, TuneTables(), done, pool)


def test_the_recipe_tunes_towards_the_float_model(tmp_path):
    """AnyBCQ as published, through the pipeline: the notes say so in every block, and the state leaves nothing behind."""
    options = ["bits=3", "precisions=[2,3]", "weights={}", "group_size=128", "stream=3"]
    recipe = load_recipe("anybcq", [f"weights.{option}" for option in options])
    recipe.stages["compensate"] = [Entry(name="tune-tables")]
    (tmp_path / "published.yaml").write_text(yaml.safe_dump(recipe.model_dump()))
    out = quantize_tiny("llama", tmp_path, str(tmp_path / "published.yaml"))
    rows = json.loads((out / "ledger.json").read_text())["tensors"]
    tuned = [row for row in rows if "layers" in row["name"]]
    assert len(tuned) == 14
    assert all(row["notes"][0].startswith("2 bits: tables tuned") for row in tuned)
    assert not list(out.glob("**/targets"))


def test_a_row_keeps_its_facts(tmp_path):
    call, source, targets, before = quantized_block(tmp_path, BCQ)
    with workers(1) as pool:
        after = tune_block("m.0", call, source, targets, TuneTables(highest=2, epochs=1), before, pool)
    for old, new in zip(before, after, strict=True):
        same = new.row.model_copy(update={"sha256": old.row.sha256, "notes": old.row.notes})
        assert replace(old, row=same).row == old.row
