"""FlexQ: its weights, the choice of layers with wide activations, and the measurement behind it on a tiny model."""

from __future__ import annotations

import json

import pytest
import torch

from anybit.calibration.parallel import workers
from anybit.decide import decided
from anybit.formats.activation import IntActivations
from anybit.formats.terms import dense, save_terms
from anybit.job import open_job
from anybit.methods.base import InputStats
from anybit.methods.flexq import FlexQInputs
from anybit.methods.rtn import SymmetricRTN
from tiny_checkpoints import quantize_tiny
from tiny_models import save_tiny


def test_weights_are_those_of_a_loop_and_the_last_group_is_short() -> None:
    weight = torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
    weight[2, 128:] = 0
    method = SymmetricRTN(bits=6, group_size=128)
    terms = method.quantize(weight, InputStats())
    assert save_terms(terms, (5, 200))[0] == method.plan((5, 200))
    found = dense(terms)
    for n in range(5):
        for start, stop in ((0, 128), (128, 200)):
            group = weight[n, start:stop]
            scale = float(torch.tensor(float(group.abs().max()) / 31 or 1.0).half())
            for value, decoded in zip(group.tolist(), found[n, start:stop].tolist(), strict=True):
                code = min(max(round(value / scale), -32), 31)
                assert decoded == pytest.approx(code * scale, abs=1e-6) or abs(decoded - value) <= scale * 0.51


def test_activations_of_a_group_do_not_see_the_others() -> None:
    spec = FlexQInputs().spec()
    x = torch.randn(3, 300, generator=torch.Generator().manual_seed(1))
    x[:, 130] = 0
    before = spec.encode(x, {})
    assert int(before.codes.abs().max()) <= 31
    assert bool(((before.values() - x).abs() <= before.scale.repeat_interleave(128, 1)[:, :300] * 0.5001).all())
    y = x.clone()
    y[:, :128] *= 1000
    after = spec.encode(y, {})
    assert torch.equal(before.codes[:, 128:], after.codes[:, 128:])


def test_the_fewest_worst_types_are_widened() -> None:
    method = FlexQInputs(budget=0.01)
    assert method.sensitive({"q": 0.002, "down": 0.3, "up": 0.05, "o": 0.004, "gate": -0.2}) == ["down", "up"]
    assert method.sensitive({"q": 0.002, "down": 0.003}) == []
    assert FlexQInputs(budget=0).sensitive({"q": 0.1, "o": 0.0}) == ["q"]


@pytest.fixture(scope="module", params=["mlp.down_proj", "self_attn.o_proj"])
def planted(request, tmp_path_factory):
    """A tiny model in which one channel of the input of one type of linears is huge and hardly read."""
    directory = tmp_path_factory.mktemp("planted") / "float"
    model = save_tiny("llama", directory)
    with torch.no_grad():
        for block in model.model.layers:
            reader = block.get_submodule(request.param)
            writer = block.mlp.up_proj if "mlp" in request.param else block.self_attn.v_proj
            writer.weight[0] *= 3e4
            read = [0] if "mlp" in request.param else [0, 16]  # two query heads share the head of values
            reader.weight[:, read] *= 1e-5
            reader.weight *= 20
    model.save_pretrained(directory)
    return directory, request.param.rpartition(".")[2]


def test_a_planted_outlier_is_found_where_it_is(planted) -> None:
    directory, sensitive = planted
    job = open_job(str(directory), "flexq-w6a6", ["activations.budget=0"])
    vocab = job.structure.geometry.vocab
    tokens = torch.randint(0, vocab, (2, 24), generator=torch.Generator().manual_seed(2))
    with workers(1) as pool:
        settled = decided(job, tokens, pool)
    notes = {name.rpartition(".")[2]: note[0] for name, note in settled.notes.items()}
    costs = {name: abs(float(note.split("cost ")[1].split(" nats")[0])) for name, note in notes.items()}
    # on random tokens an error may as well lower the loss of a random model
    assert max(costs, key=lambda name: costs[name]) == sensitive, costs


def test_the_plan_is_what_runs_and_the_ledger_says_why(tmp_path) -> None:
    out = quantize_tiny(
        "llama", tmp_path, "flexq-w6a6", overrides=["activations.budget=0", "activations.group_size=32"]
    )
    ledger = json.loads((out / "ledger.json").read_text())
    forms = json.loads((out / "config.json").read_text())["quantization_config"]
    text = json.dumps(forms)
    assert '"flexq"' not in text
    wide = 0
    for row in ledger["tensors"]:
        if "embed" in row["name"] or "lm_head" in row["name"]:
            continue
        (note,) = [note for note in row["notes"] if "nats" in note]
        cost, bits = float(note.split("cost ")[1].split(" nats")[0]), note.rpartition(": ")[2]
        assert row["actual"].endswith("@int8g32" if bits == "8 bits" else "@int6g32")
        assert bits == "8 bits" or cost <= 0.001
        wide += bits == "8 bits"
    assert wide
    assert isinstance(FlexQInputs().spec(True), IntActivations)
