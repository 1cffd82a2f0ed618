"""Squared gradients of a whole model against plain autograd, and how a run keeps and repeats them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from anybit import pipeline, run
from anybit.blocks import quantize_block
from anybit.calibration.activations import Activations
from anybit.calibration.fisher import fisher
from anybit.calibration.parallel import workers
from anybit.calibration.statistics import BlockCall
from anybit.errors import RecipeError
from anybit.formats.terms import dense, load_terms
from anybit.methods.any_precision import AnyPrecision
from anybit.methods.base import InputStats
from anybit.models.graph import block_inputs, trace_block
from anybit.models.normalize import normalize
from anybit.recipe import Assignment
from tiny_checkpoints import quantize_tiny
from tiny_models import tiny, token_ids

LINEARS = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]


def test_it_is_the_sum_of_squared_gradients_of_each_sequence():
    model = tiny("llama")
    normalize(model)
    tokens = torch.cat([token_ids(20, seed=s) for s in range(5)])
    with workers(2) as pool:
        found = fisher(model, LINEARS, tokens, pool, in_flight=2)
        again = fisher(model, LINEARS, tokens, pool, in_flight=4)
    wanted = {name: torch.zeros_like(found[name]) for name in LINEARS}
    for row in tokens:
        model.zero_grad()
        with torch.enable_grad():
            model(input_ids=row[None], labels=row[None]).loss.backward()  # transformers' own loss
        for name in LINEARS:
            wanted[name] += model.get_parameter(f"{name}.weight").grad ** 2
    assert list(found) == LINEARS
    for name in LINEARS:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-12)
        assert torch.equal(found[name], again[name])
        assert not found[name].requires_grad


def test_linears_that_share_an_input_get_their_own_gradients(tmp_path):
    """Query, key and value are clustered together, each row by its own weights."""
    model = tiny("llama")
    normalize(model)
    hidden, kwargs = block_inputs(model, ["model.layers.0"], token_ids(12))[0]
    source = Activations(tmp_path / "hidden", 1, 12, 64)
    source.write(0, hidden)
    block, method = model.get_submodule("model.layers.0"), AnyPrecision(bits=3, seed_bits=2)
    graph = trace_block(block, hidden, kwargs)
    generator = torch.Generator().manual_seed(0)
    weights = {f"m.{name}": block.get_parameter(f"{name}.weight").clone() for name in graph.linears}
    gradients = {name: torch.rand(weight.shape, generator=generator) ** 4 for name, weight in weights.items()}
    methods = dict.fromkeys(weights, method)
    with workers(1) as pool:
        done = quantize_block(
            "m", BlockCall(block, kwargs), graph, source, Assignment((), methods), pool, False, gradients
        )
    for item in done:
        alone = method.quantize(weights[item.name], InputStats(fisher=gradients[item.name]))
        assert torch.equal(dense(load_terms(item.form, item.tensors)), dense(alone)), item.name


def test_experts_without_tokens_have_none():
    model = tiny("mixtral")
    normalize(model)
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".experts." in n]
    with workers(1) as pool:
        found = fisher(model, names, token_ids(2), pool, in_flight=1)
    sizes = [float(f.sum()) for f in found.values()]
    assert min(sizes) == 0 < max(sizes)


OPTIONS = {"recipe": "any-precision", "overrides": ["weights.bits=3", "weights.precisions=[2,3]"]}


def files(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


class _KillError(Exception):
    pass


def test_an_interrupted_run_goes_on_with_the_gradients_it_had(tmp_path, monkeypatch):
    whole = files(quantize_tiny("llama", tmp_path / "whole", **OPTIONS))
    real, seen, calls = pipeline.quantize_block, {}, []

    def dying(name, *rest):
        seen[name] = rest[-1]
        if name.endswith(".1") and len(calls) == 1:
            raise _KillError
        return real(name, *rest)

    def counting(*arguments):
        calls.append(list(arguments[2]))
        write(*arguments)

    write = run.write_fisher
    monkeypatch.setattr(run, "write_fisher", counting)
    monkeypatch.setattr(pipeline, "quantize_block", dying)
    with pytest.raises(_KillError):
        quantize_tiny("llama", tmp_path / "cut", **OPTIONS)
    state = tmp_path / "cut" / "out.partial" / "state"
    assert sorted(path.name for path in state.glob("fisher-*")) == ["fisher-1.safetensors"]  # block 0 is done
    kept = load_file(state / "fisher-1.safetensors")
    assert len(kept) == 7
    calls.append("second life")
    assert files(quantize_tiny("llama", tmp_path / "cut", resume=True, **OPTIONS)) == whole
    assert calls == [["model.layers.0", "model.layers.1"], "second life"]
    assert all(torch.equal(seen["model.layers.1"][name], kept[name]) for name in kept)


def test_hessian_sensitivity_takes_no_gradients(tmp_path, monkeypatch):
    monkeypatch.setattr("anybit.run.write_fisher", lambda *_: pytest.fail("gradients were taken"))
    quantize_tiny("llama", tmp_path, **OPTIONS | {"overrides": [*OPTIONS["overrides"], "weights.sensitivity=hessian"]})


def test_gradients_of_a_transformed_model_are_refused(tmp_path):
    text = (
        "{name: mine, paper: p, summary: s, weights: w, stages: "
        "{transform: [{name: awq-scale}], weights: [{name: any-precision}]}}"
    )
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(RecipeError, match="untransformed model"):
        quantize_tiny("llama", tmp_path, recipe=str(tmp_path / "mine.yaml"))
