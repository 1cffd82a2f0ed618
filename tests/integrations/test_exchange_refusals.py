"""What a format cannot say is refused with the reason; nothing half-written stays; the command says it in one line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import anybit
from anybit.cli.app import app
from anybit.cli.errors import run
from anybit.errors import FormatError, InputError
from anybit.integrations.exchange.checkpoint import Checkpoint
from exchange_case import alter, config_of, same_values, tensors_of, values_of
from tiny_checkpoints import quantize_tiny

UNSAYABLE = {
    "outlier columns": ("llama", {"recipe": "quik-w8a8"}, "compressed-tensors", "outlier columns"),
    "two widths": ("llama", {"recipe": "quik-w4a4"}, "gptq", "more than one width"),
    "codebooks": ("llama", {"recipe": "any-precision"}, "compressed-tensors", "codebook codes"),
    "binary-coded": ("llama", {"recipe": "anybcq"}, "gguf", "binary-coded codes"),
    "fused experts": ("mixtral", {}, "gptq", "experts or Conv1D"),
    "Conv1D": ("gpt2", {}, "gptq", "experts or Conv1D"),
    "5 bits": ("llama", {"overrides": ["weights.bits=5"]}, "gptq", "5 bits"),
    "3 bits for AWQ": ("llama", {"overrides": ["weights.bits=3"]}, "awq", "3 bits"),
    "groups that do not divide": ("llama", {"overrides": ["weights.group_size=40"]}, "gptq", "do not divide"),
    "Gemma in GGUF": ("gemma2", {}, "gguf", "gemma2"),
    "activations": ("llama", {"recipe": "smoothquant-w8a8"}, "gguf", "quantized activations"),
}


@pytest.mark.parametrize("what", UNSAYABLE)
def test_refused_with_the_reason(what, tmp_path):
    family, options, to, reason = UNSAYABLE[what]
    source = quantize_tiny(family, tmp_path, **options)
    with pytest.raises(InputError, match=reason):
        anybit.export(source, to=to, out=tmp_path / "export")
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("export")]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return quantize_tiny("llama", tmp_path_factory.mktemp("source"), overrides=["weights.group_size=32"])


@pytest.fixture(scope="module")
def nested(tmp_path_factory):
    return quantize_tiny("llama", tmp_path_factory.mktemp("nested"), recipe="pmpd")


def test_an_output_in_use_is_left_alone(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    (tmp_path / "file.gguf").write_text("mine")
    for to, out in (("gptq", "out"), ("gguf", "file.gguf"), ("gptq", "file.gguf"), ("gguf", "out")):
        with pytest.raises(InputError, match=r"not empty|is a file|is a directory"):
            anybit.export(source, to=to, out=tmp_path / out)
    assert (tmp_path / "file.gguf").read_text() == (tmp_path / "out" / "mine").read_text() == "mine"
    anybit.export(source, to="gptq", out=tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "mine").exists()
    with pytest.raises(InputError, match="would replace"):
        anybit.import_checkpoint(tmp_path / "out", out=tmp_path / "out")


def test_nothing_replaces_what_it_is_made_from(source, tmp_path):
    shutil.copytree(source, tmp_path / "models" / "mine")
    before = sorted((tmp_path / "models" / "mine").iterdir())
    for out in ("models/mine", "models", "models/../models/mine"):
        with pytest.raises(InputError, match="would replace"):
            anybit.export(tmp_path / "models" / "mine", to="gptq", out=tmp_path / out, overwrite=True)
        with pytest.raises(InputError, match="would replace"):
            anybit.import_checkpoint(tmp_path / "models" / "mine", out=tmp_path / out, overwrite=True)
    assert sorted((tmp_path / "models" / "mine").iterdir()) == before
    with pytest.raises(InputError, match="would replace"):
        anybit.quantize(str(source.parent / "float"), recipe="rtn-w4", out=str(source.parent), overwrite=True)


def test_an_older_config_and_a_folder_that_is_no_companion(tmp_path):
    older = quantize_tiny("llama", tmp_path, half=True)
    config = json.loads((older / "config.json").read_text())
    (older / "config.json").write_text(json.dumps({**config, "torch_dtype": config.pop("dtype")}))
    (older / "tokenizer_extra").mkdir()
    assert Checkpoint(older).dtype == torch.bfloat16
    anybit.export(older, to="gptq", out=tmp_path / "exported")
    assert (tmp_path / "exported" / "tokenizer.json").is_file()


def test_a_damaged_source_writes_nothing(source, tmp_path):
    shutil.copytree(source, tmp_path / "damaged")
    alter(tmp_path / "damaged", "model.layers.1.mlp.up_proj.scale", lambda t: t * 2)
    with pytest.raises(FormatError, match="altered"):
        anybit.export(tmp_path / "damaged", to="gptq", out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_a_nested_checkpoint_is_exact_at_full_width(nested, tmp_path):
    assert anybit.export(nested, to="compressed-tensors", out=tmp_path / "ct")["lossless"]
    anybit.import_checkpoint(tmp_path / "ct", out=tmp_path / "back")
    back, expected = values_of(tmp_path / "back"), values_of(nested)
    assert same_values(back, expected)


@pytest.mark.parametrize("bits", [3, 4])
def test_a_nested_checkpoint_is_rounded_anew_below_that(nested, bits, tmp_path):
    with pytest.raises(InputError, match="zero points between codes"):
        anybit.export(nested, to="compressed-tensors", out=tmp_path / "ct", precision=bits)
    result = anybit.export(nested, to="compressed-tensors", out=tmp_path / "ct", precision=bits, allow_loss=True)
    assert not result["lossless"]
    assert result["notes"][0].startswith("lost: zero points between codes")
    anybit.import_checkpoint(tmp_path / "ct", out=tmp_path / "back")
    name = "model.layers.0.mlp.up_proj"
    found, full = values_of(tmp_path / "back")[f"{name}.weight"], values_of(nested)[f"{name}.weight"]
    step = tensors_of(tmp_path / "back")[f"{name}.scale"].float().repeat_interleave(32, 1)
    error = (found - full).abs() / step
    assert float(error.max()) <= 1  # half a step of rounding, half of the zero at the ends of a group
    assert float(error.square().mean().sqrt()) < 0.31


def test_a_precision_that_is_not_there(nested, tmp_path):
    with pytest.raises(InputError, match="precision 7"):
        anybit.export(nested, to="gptq", out=tmp_path / "x", precision=7)


def command(*arguments):
    return run(lambda: app([str(argument) for argument in arguments], standalone_mode=False))


def test_the_commands(source, tmp_path, capsys):
    assert command("export", source, "--to", "awq", "--out", tmp_path / "awq", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert {"format": "awq", "lossless": True, "path": str(tmp_path / "awq")}.items() <= result.items()
    assert isinstance(result["notes"], list)
    assert command("import", tmp_path / "awq", "--out", tmp_path / "back", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["layers"] == 14
    rows = json.loads((tmp_path / "back" / "ledger.json").read_text())["tensors"]
    assert {row["planned"] for row in rows} == {"imported"}
    assert {row["actual"] for row in rows} == {"affine4g32"}
    assert command("inspect", tmp_path / "back") == 0
    assert "imported from AWQ gemm" in capsys.readouterr().err
    assert config_of(tmp_path / "back")["recipe"] == "imported from AWQ gemm"


MISTAKES = {
    "an unknown format": (["export", "SOURCE", "--to", "gtpq", "--out", "OUT"], "did you mean 'gptq'"),
    "no checkpoint": (["export", "OUT", "--to", "gptq", "--out", "OUT"], "no such directory"),
    "nothing to import": (["import", "OUT", "--out", "OUT2"], "no such directory or .gguf file"),
    "ours already": (["import", "SOURCE", "--out", "OUT"], "an anybit checkpoint already"),
    "a float model": (["import", "FLOAT", "--out", "OUT"], "not quantized"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_are_one_line(what, source, tmp_path, capsys):
    arguments, message = MISTAKES[what]
    places = {"SOURCE": source, "OUT": tmp_path / "out", "OUT2": tmp_path / "out2", "FLOAT": source.parent / "float"}
    assert command(*[places.get(each, each) for each in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
