"""Bad input: one line that says what, where and how to fix; nothing left behind."""

from __future__ import annotations

import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import anybit
from anybit.checkpoint import partial
from anybit.errors import AnybitError, CalibrationError, FormatError, InputError, PromiseError, RecipeError
from tiny_models import save_tiny

OPTIONS = {"recipe": "gptq-w4", "samples": 4, "seq_len": 32}


def refused(kind, match, tmp_path, model, text, **options):
    """Quantizing raises `kind` in one line that matches, and leaves no output."""
    with pytest.raises(kind, match=match) as caught:
        anybit.quantize(str(model), out=str(tmp_path / "out"), calibration=str(text), **{**OPTIONS, **options})
    assert isinstance(caught.value, AnybitError)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.fixture
def own_model(float_dir, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(float_dir, tmp_path / "model")


def test_missing_model(tmp_path, text_file):
    refused(InputError, "no such directory", tmp_path, tmp_path / "nowhere", text_file)


def test_truncated_weights(tmp_path, own_model, text_file):
    shard = own_model / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    refused(InputError, "model.safetensors", tmp_path, own_model, text_file)


def test_truncated_gguf(tmp_path, text_file):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(20))
    refused(InputError, "model.gguf", tmp_path, file, text_file)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"recipe": "gptk-w4"}, "did you mean 'gptq-w4'"),
        ({"overrides": ["weights.bitz=3"]}, "did you mean 'bits'"),
        ({"overrides": ["weights.bits=9"]}, "weights.bits"),
        ({"overrides": ["weights.name=gptqq"]}, "did you mean 'gptq'"),
        ({"overrides": ["wieghts.bits=3"]}, "did you mean 'weights'"),
        ({"overrides": ["weights.group_size=0"]}, "group_size"),
        ({"overrides": ["weights"]}, "stage.option=value"),
        ({"recipe": "missing.yaml"}, "does not exist"),
    ],
)
def test_recipes_and_options_that_do_not_fit(tmp_path, float_dir, text_file, options, match):
    refused(RecipeError, match, tmp_path, float_dir, text_file, **options)


def test_pattern_that_matches_nothing_and_tensors_left_out_are_reported_together(tmp_path, float_dir, text_file):
    recipe = tmp_path / "mine.yaml"
    stages = {"weights": [{"name": "rtn", "targets": ["*.q_porj"]}, {"name": "rtn", "targets": ["*.k_proj"]}]}
    recipe.write_text(json.dumps({"name": "mine", "paper": "-", "summary": "-", "weights": "-", "stages": stages}))
    refused(
        RecipeError, "'\\*.q_porj' matches nothing.*no entry covers", tmp_path, float_dir, text_file, recipe=str(recipe)
    )


def test_text_too_short(tmp_path, float_dir):
    (tmp_path / "short.txt").write_text("too short")
    refused(CalibrationError, "tokens", tmp_path, float_dir, tmp_path / "short.txt")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_weight_is_named(tmp_path, own_model, text_file, bad):
    state = load_file(own_model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    state[name][3, 5] = bad
    save_file(state, own_model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        anybit.quantize(str(own_model), out=str(tmp_path / "out"), calibration=text_file, **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_expert_without_tokens_is_named_unless_allowed(tmp_path, text_file):
    save_tiny("mixtral", tmp_path / "moe")
    state = load_file(tmp_path / "moe" / "model.safetensors")
    router = next(name for name in state if "layers.0" in name and name.endswith("gate.weight"))
    state[router] = torch.zeros_like(state[router])  # equal scores: the first experts get every token
    save_file(state, tmp_path / "moe" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CalibrationError, match=r"experts\.\d.*--allow-unseen-experts"):
        anybit.quantize(str(tmp_path / "moe"), out=str(tmp_path / "out"), calibration=text_file, **OPTIONS)
    options = {**OPTIONS, "overwrite": True, "allow_unseen_experts": True}
    anybit.quantize(str(tmp_path / "moe"), out=str(tmp_path / "out"), calibration=text_file, **options)
    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text())
    assert any("no calibration token" in note for row in ledger["tensors"] for note in row["notes"])


def test_output_that_is_not_empty_is_kept(tmp_path, float_dir, text_file):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    with pytest.raises(InputError, match="--overwrite"):
        anybit.quantize(str(float_dir), out=str(out), calibration=text_file, **OPTIONS)
    assert (out / "mine").read_text() == "precious"


def test_full_disk_keeps_what_is_done_and_resumes(tmp_path, float_dir, text_file, monkeypatch):
    real, calls = partial.save_file, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(partial, "save_file", full)
    with pytest.raises(PromiseError, match=r"no disk space left.*--resume"):
        anybit.quantize(str(float_dir), out=str(tmp_path / "out"), calibration=text_file, **OPTIONS)
    assert not (tmp_path / "out").exists()
    anybit.quantize(str(float_dir), out=str(tmp_path / "out"), calibration=text_file, resume=True, **OPTIONS)
    anybit.load(tmp_path / "out")


def test_too_little_memory_is_refused_before_work(tmp_path, float_dir, text_file):
    refused(PromiseError, "--max-ram", tmp_path, float_dir, text_file, max_ram="50MB")
    refused(InputError, "8GiB", tmp_path, float_dir, text_file, max_ram="lots")


def test_group_that_does_not_divide_is_said_in_the_ledger(tmp_path, float_dir, text_file):
    anybit.quantize(
        str(float_dir), out=str(tmp_path / "out"), calibration=text_file, overrides=["weights.group_size=48"], **OPTIONS
    )
    rows = json.loads((tmp_path / "out" / "ledger.json").read_text())["tensors"]
    notes = [note for row in rows if row["shape"][1] == 64 and row["bits"] == 4 for note in row["notes"]]
    assert notes
    assert all("last group of each row has 16" in note for note in notes)
    anybit.load(tmp_path / "out")


@pytest.fixture(scope="module")
def good(float_dir, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("good") / "out"
    anybit.quantize(str(float_dir), out=str(out), calibration=text_file, **OPTIONS)
    return out


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda d: flip(d / "model-00002-of-00004.safetensors", -9), "altered since"),
        (lambda d: truncate(d / "model-00003-of-00004.safetensors"), "truncated or damaged"),
        (lambda d: (d / "ledger.json").unlink(), "no ledger.json"),
        (lambda d: edit(d / "ledger.json", lambda j: j["tensors"].pop()), "disagree about"),
        (lambda d: edit(d / "config.json", lambda j: j["quantization_config"].update(version=99)), "update anybit"),
        (lambda d: (d / "config.json").write_text("{"), "not JSON"),
        (lambda d: (d / "model.safetensors.index.json").unlink(), "index.json"),
        (lambda d: edit(d / "canary.json", lambda j: j.pop("ids")), "canary.json"),
    ],
)
def test_damaged_checkpoints_are_refused(good, tmp_path, damage, match):
    broken = shutil.copytree(good, tmp_path / "broken")
    damage(broken)
    with pytest.raises(FormatError, match=match):
        anybit.load(broken)


def test_a_canary_that_answers_otherwise_is_a_broken_promise(good, tmp_path):
    broken = shutil.copytree(good, tmp_path / "broken")
    edit(broken / "canary.json", lambda j: j["top_logits"].__setitem__(0, j["top_logits"][0] + 1))
    with pytest.raises(PromiseError, match="canary"):
        anybit.load(broken)


def test_a_float_directory_is_not_a_checkpoint(float_dir):
    with pytest.raises(FormatError, match="anybit quantize"):
        anybit.load(float_dir)


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x5A
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
