"""Blocks from float inputs: any order, any process, any interruption, and the bytes are those of one process alone."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import anybit
from anybit.calibration.text import read_documents
from anybit.calibration.tokens import calibration_tokens
from anybit.checkpoint.ledger import Ledger
from anybit.errors import InputError
from anybit.held_out import SAMPLES
from anybit.job import open_job
from anybit.models.source import open_model
from tiny_models import save_tiny

SIZES = {"samples": 4, "seq_len": 32}


def digest(directory: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(directory.iterdir()) if f.is_file()}


def quantize(float_dir, text_file, out, recipe="gptq-w4", **options):
    options = {"block_inputs": "float", "threads": 1, **SIZES, **options}
    anybit.quantize(str(float_dir), recipe=recipe, out=str(out), calibration=text_file, **options)
    return digest(out)


@pytest.fixture(scope="module")
def float_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("independent") / "float"
    save_tiny("llama", directory, num_hidden_layers=4)
    return directory


@pytest.fixture(scope="module")
def whole(float_dir, text_file, tmp_path_factory):
    """One process, in order."""
    out = tmp_path_factory.mktemp("whole") / "out"
    quantize(float_dir, text_file, out)
    return out


@pytest.mark.parametrize("recipe", ["gptq-w4", "flexq-w6a6", "quik-w4a4"])  # flexq decides widths before the work
def test_any_order_elsewhere_and_twice_gives_the_same_bytes(float_dir, text_file, tmp_path, recipe):
    def backwards(parcel, due):
        for index, arguments in reversed(list(due)):
            rows = parcel.out.with_name("out.partial") / "state" / f"rows-{index}.json"
            inputs = rows.with_name(f"hidden-{index}").read_bytes()
            parcel.quantize(index, arguments, threads=2)
            rows.unlink()  # died after the shard, before it could say so
            rows.with_name(f"hidden-{index}").write_bytes(inputs)
            parcel.quantize(index, arguments, threads=1)
            parcel.quantize(index, arguments, threads=1)  # done: nothing to do
            yield index

    options = {"recipe": recipe, "overrides": ["activations.budget=0.0"] if "flexq" in recipe else []}
    whole = quantize(float_dir, text_file, tmp_path / "whole", **options)
    assert quantize(float_dir, text_file, tmp_path / "out", spread=backwards, **options) == whole


@pytest.mark.parametrize("after", [1, 3])
def test_an_interrupted_run_goes_on(whole, float_dir, text_file, tmp_path, after):
    def interrupt(stage, done, total):
        if done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(float_dir, text_file, tmp_path / "out", progress=interrupt)
    assert not (tmp_path / "out").exists()
    seen = []
    found = quantize(
        float_dir, text_file, tmp_path / "out", resume=True, progress=lambda _, done, __: seen.append(done)
    )
    assert found == digest(whole)
    assert seen == list(range(after, 5))


def test_inputs_are_dropped_as_blocks_are_done(float_dir, text_file, tmp_path):
    state, seen = tmp_path / "out.partial" / "state", []
    quantize(float_dir, text_file, tmp_path / "out", progress=lambda *_: seen.append(len(list(state.glob("hidden-*")))))
    assert max(seen) == 1


def test_the_ledger_says_so_and_resuming_otherwise_is_refused(whole, float_dir, text_file, tmp_path):
    assert Ledger.read(whole).identity["block_inputs"] == "float"
    anybit.load(whole)  # hashes and canary
    usual = quantize(float_dir, text_file, tmp_path / "out", block_inputs="quantized")
    assert "block_inputs" not in Ledger.read(tmp_path / "out").identity
    shards = [f"model-0000{number}-of-00006.safetensors" for number in range(1, 7)]
    same = [usual[name] == digest(whole)[name] for name in shards]
    assert same == [
        True,
        True,
        False,
        False,
        False,
        True,
    ]  # nothing comes before embedding and first block; the head sees none
    with pytest.raises(InputError, match=r"another job: block_inputs"):
        quantize(float_dir, text_file, tmp_path / "out", resume=True)


def test_a_method_without_statistics_does_not_care(float_dir, text_file, tmp_path):
    one = quantize(float_dir, text_file, tmp_path / "a", recipe="rtn-w4")
    two = quantize(float_dir, text_file, tmp_path / "b", recipe="rtn-w4", block_inputs="quantized")
    assert {k: v for k, v in one.items() if k.startswith("model")} == {
        k: v for k, v in two.items() if k.startswith("model")
    }


@pytest.mark.parametrize("recipe", ["quik-w4a4", "smoothquant-w8a8"])
def test_transforms_and_quantized_activations_answer_as_saved(float_dir, text_file, tmp_path, recipe):
    quantize(float_dir, text_file, tmp_path / "out", recipe=recipe)
    anybit.load(tmp_path / "out")
    canary = json.loads((tmp_path / "out" / "canary.json").read_text())
    model = anybit.load(tmp_path / "out")
    with torch.inference_mode():
        logits = model(torch.tensor([canary["ids"]])).logits[0, -1]
    found = logits[canary["top_ids"]] - torch.tensor(canary["top_logits"])
    assert float(found.abs().max()) <= canary["allowed"] * canary["spread"]


def test_a_rotated_stream_is_the_float_models_own(float_dir, text_file, tmp_path):
    found = {}

    def look(parcel, due):
        for index, arguments in due:
            found[index] = (parcel.out.with_name("out.partial") / "state" / f"hidden-{index}").read_bytes()
            parcel.quantize(index, arguments, threads=1)
            yield index
        found["tokens"] = parcel.tokens[0]

    quantize(float_dir, text_file, tmp_path / "out", recipe="qoq-w4a8kv4", spread=look)
    model = AutoModelForCausalLM.from_pretrained(float_dir, dtype=torch.float32)
    stream = open_job(str(float_dir), "qoq-w4a8kv4").rotation.stream
    with torch.inference_mode():
        states = model(found["tokens"], output_hidden_states=True).hidden_states
    for index in (0, 2):
        on_disk = torch.frombuffer(bytearray(found[index]), dtype=torch.float32).view(states[index].shape)
        expected = stream.turn(states[index]).float()
        assert (
            float((on_disk - expected).norm() / expected.norm()) < 0.1
        )  # the embedding has 8 bits; another basis is 1.4 away


def test_held_out_perplexity_is_what_the_checkpoint_answers(float_dir, text_file, tmp_path):
    options = {"recipe": "pmpd", "overrides": ["weights.group_size=16"]}
    quantize(float_dir, text_file, tmp_path / "out", **options)
    found = Ledger.read(tmp_path / "out").precisions
    tokenizer = open_model(str(float_dir)).tokenizer()
    tokens = calibration_tokens(tokenizer, read_documents(text_file), samples=4 + SAMPLES, seq_len=32, seed=0)[4:]
    for bits in (2, 4, 8):
        model = anybit.load(tmp_path / "out", bits)
        with torch.inference_mode():
            losses = [torch.nn.functional.cross_entropy(model(t[None]).logits[0, :-1], t[1:]) for t in tokens]
        assert found[str(bits)] == pytest.approx(math.exp(float(torch.stack(losses).mean())), rel=1e-4)
    usual = tmp_path / "usual"
    quantize(float_dir, text_file, usual, block_inputs="quantized", **options)
    assert found["float"] == pytest.approx(Ledger.read(usual).precisions["float"], rel=1e-6)


def test_what_cannot_be_done_so_is_refused_before_any_work(float_dir, text_file, tmp_path):
    def nobody(parcel, due):
        raise AssertionError

    for options, match in (
        ({"block_inputs": "quantized", "spread": nobody}, "--block-inputs float"),
        ({"block_inputs": "both"}, "quantized or float"),
        ({"recipe": "abq-w4a4"}, "'abq' learns"),
    ):
        with pytest.raises(InputError, match=match):
            quantize(float_dir, text_file, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_every_tensor_of_a_shard_is_in_the_rows(whole):
    rows = {row.name: row for row in Ledger.read(whole).tensors}
    shard = load_file(whole / "model-00003-of-00006.safetensors")
    assert {key.rpartition(".")[0] for key in shard if key.endswith(".scale")} == {
        name for name in rows if name.startswith("model.layers.1.")
    }
