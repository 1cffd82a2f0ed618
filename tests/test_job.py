"""What is promised before any work is what comes out: sizes to the byte, methods by tensor, memory that grows."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from safetensors import safe_open
from torch import nn

import anybit
from anybit.errors import InputError, PromiseError, RecipeError, StructureError
from anybit.job import MOST_SAMPLES, open_job, parse_bytes, samples_in_flight
from tiny_checkpoints import quantize_tiny
from tiny_models import save_tiny

CASES = {
    "untied": ("llama", {}, {}),
    "tied": ("llama", {"tie_word_embeddings": True}, {}),
    "uneven groups": ("llama", {}, {"overrides": ["weights.group_size=48", "embeddings.group_size=40"]}),
    "symmetric": ("llama", {}, {"overrides": ["weights.symmetric=true", "weights.bits=3"]}),
    "whole rows": ("qwen2", {}, {"overrides": ["weights.group_size=-1"]}),
    "float tables": ("llama", {}, {"overrides": ["embeddings.name=float"]}),
    "float linears": ("llama", {"tie_word_embeddings": True}, {"overrides": ["weights.name=float"]}),
    "conv1d": ("gpt2", {}, {}),
    "experts and gate": ("qwen2_moe", {}, {}),
    "half": ("llama", {}, {"half": True}),
}


def stored(directory):
    """(bytes of all tensors, by reading them; tensor names)."""
    size, names = 0, []
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dict)
                size += shard.get_tensor(name).nbytes
                names.append(name)
    return size, names


@pytest.mark.parametrize("case", CASES)
def test_predicted_size_is_the_size(case, tmp_path):
    family, config, options = CASES[case]
    out = quantize_tiny(family, tmp_path, config=config, **options)
    ledger = json.loads((out / "ledger.json").read_text())
    size, names = stored(out)
    found = anybit.plan(str(tmp_path / "float"), recipe="rtn-w4", overrides=options.get("overrides", ()))
    assert found["predicted"]["size_bytes"] == ledger["size_bytes"] == size
    assert len(set(names)) == len(names)
    model = open_job(str(tmp_path / "float"), "rtn-w4").source.skeleton()
    weights = sum(p.numel() for p in model.parameters())
    assert found["bits_per_weight"] == ledger["bits_per_weight"] == pytest.approx(8 * size / weights)
    assert found["float_bytes"] == ledger["float_bytes"] == weights * (2 if options.get("half") else 4)
    assert [layer["name"] for layer in found["layers"]] == sorted((row["name"] for row in ledger["tensors"]), key=[
        layer["name"] for layer in found["layers"]].index)  # fmt: skip
    planned = {layer["name"]: (layer["form"], layer["shape"], layer["bits_per_weight"]) for layer in found["layers"]}
    assert planned == {row["name"]: (row["actual"], row["shape"], row["bits_per_weight"]) for row in ledger["tensors"]}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("job") / "float"
    save_tiny("qwen2_moe", path)
    return path


def test_gates_and_routers_stay_float(directory):
    job = open_job(str(directory), "rtn-w4")
    linears = {name for name, module in job.model.named_modules() if isinstance(module, nn.Linear)}
    gates = {name for name in linears if name.endswith("shared_expert_gate")}
    assert len(gates) == 2
    assert set(job.forms) == linears - gates | {"model.embed_tokens"}
    assert not any(name.endswith("mlp.gate") for name in job.forms)


def test_a_plan_invents_nothing(directory):
    predicted = anybit.plan(str(directory), recipe="gptq-w4")["predicted"]
    assert {key for key, value in predicted.items() if value is None} == {"seconds", "kl", "tokens_per_second"}


def test_memory_grows_with_samples_and_length_and_stops_at_those_in_flight(directory):
    def peak(samples, seq_len):
        return anybit.plan(str(directory), recipe="rtn-w4", samples=samples, seq_len=seq_len)["predicted"][
            "peak_rss_bytes"
        ]

    job = open_job(str(directory), "rtn-w4")
    block = job.model.get_submodule("model.layers.0")
    inputs = sum(m.in_features for m in block.modules() if isinstance(m, nn.Linear))
    large = 1 << 24  # so that the activations decide, not the few megabytes this process may grow by meanwhile
    for more, fewer in (((2, large), (1, large)), ((1, 2 * large), (1, large))):
        assert peak(*more) - peak(*fewer) == pytest.approx(4 * inputs * large, rel=0.01)
    assert peak(99, large) == pytest.approx(peak(MOST_SAMPLES, large), rel=0.01)


def test_problems_show_before_any_work(directory, tmp_path):
    with pytest.raises(RecipeError):
        anybit.plan(str(directory), recipe="rtn-w4", overrides=["weights.bits=1"])
    with pytest.raises(InputError):
        anybit.plan(str(tmp_path / "none"), recipe="rtn-w4")
    assert issubclass(StructureError, InputError)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * 2**30), ("500MB", 500_000_000), ("3g", 3 * 2**30), ("12345", 12345), ("1.5KiB", 1536),
        ("2kb", 2000), ("2k", 2048), ("1TB", 10**12), ("1TiB", 2**40), ("0.5 GB", 500_000_000), (" 7 mib ", 7 * 2**20),
        ("9b", 9),
    ],
)  # fmt: skip
def test_sizes_in_words(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "lots", "-1GB", "GB", "1XB", "1 2", "1GBB", "1e9", "nan", "1,5GB", "0x10"])
def test_words_that_are_no_size(text):
    with pytest.raises(InputError, match="8GiB or 500MB"):
        parse_bytes(text)


@pytest.mark.parametrize(("limit", "count"), [(None, 4), (10**6, 4), (1400, 4), (1399, 3), (1250, 2), (1100, 1)])
def test_samples_in_flight(limit, count):
    job = SimpleNamespace(peak_bytes=lambda samples, seq_len: 1000 + samples * seq_len)
    assert samples_in_flight(job, limit, 100) == count


def test_not_even_one_sample_fits():
    job = SimpleNamespace(peak_bytes=lambda samples, _: samples * 2**30)
    with pytest.raises(PromiseError, match=r"--max-ram 0\.50GiB is less than the 1\.00GiB"):
        samples_in_flight(job, 2**29, 100)
