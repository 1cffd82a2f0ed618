"""Recipes with quantized activations, from float directory to loaded model: learning resumes, memory is kept."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import anybit
from anybit.errors import PromiseError, RecipeError
from anybit.job import open_job
from anybit.layers.linear import QuantLinear

SIZES = {"samples": 4, "seq_len": 32}
LEARN = {"recipe": "abq-w4a4", "overrides": ["learn.epochs=2"]}


@pytest.fixture(scope="module")
def learned(float_dir, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("abq") / "out"
    anybit.quantize(str(float_dir), out=str(out), calibration=text_file, threads=1, **LEARN, **SIZES)
    return out


def test_the_ledger_and_the_layers_say_how_inputs_are_read(learned):
    rows = json.loads((learned / "ledger.json").read_text())["tensors"]
    linears = [row for row in rows if "layers" in row["name"]]
    assert all(row["actual"] == row["planned"] == f"affine4g{min(64, row['shape'][1])}@int4" for row in linears)
    assert all(any("learned by abq" in note for note in row["notes"]) for row in linears)
    assert all(row["kernel"] == "linear_w_a8" for row in linears)
    model = anybit.load(str(learned))
    layer = next(module for module in model.modules() if isinstance(module, QuantLinear))
    assert layer.form["activations"]["bits"] == 4
    again = AutoModelForCausalLM.from_pretrained(learned, dtype=torch.float32)
    ids = torch.arange(3, 20)[None]
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_learning_that_was_interrupted_ends_in_the_same_bytes(learned, float_dir, text_file, tmp_path):
    out = tmp_path / "out"

    def interrupt(stage, done, total):
        if done == 1:
            raise KeyboardInterrupt

    options = {"out": str(out), "calibration": text_file, "threads": 2, **LEARN, **SIZES}
    with pytest.raises(KeyboardInterrupt):
        anybit.quantize(str(float_dir), progress=interrupt, **options)
    anybit.quantize(str(float_dir), resume=True, **options)
    for file in sorted(learned.iterdir()):
        assert file.read_bytes() == (out / file.name).read_bytes(), file.name


def test_learning_counts_into_the_memory_that_is_promised(float_dir, text_file, tmp_path):
    plain, learning = (open_job(str(float_dir), "abq-w4a4", over) for over in ((), ["learn.batch=2"]))
    assert plain.peak_bytes(1, 512) == pytest.approx(learning.peak_bytes(1, 512), rel=0.05)
    without = open_job(str(float_dir), "rtn-w4")
    assert learning.peak_bytes(4, 2048) > without.peak_bytes(4, 2048)
    with pytest.raises(PromiseError, match="raise it, or lower --seq-len"):
        anybit.quantize(
            str(float_dir), out=str(tmp_path / "o"), calibration=text_file, max_ram="1MiB", **LEARN, **SIZES
        )
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("weights.name=anybcq", "abq learns for affine grids"),
        ("activations.static=true", "static"),
        ("activations.bits=1", "greater than or equal to 2"),
        ("activations.name=posit", "unknown method 'posit'"),
    ],
)
def test_stages_that_do_not_go_together_are_refused_before_work(float_dir, text_file, tmp_path, override, reason):
    with pytest.raises(RecipeError, match=reason):
        anybit.quantize(
            str(float_dir),
            recipe="abq-w4a4",
            out=str(tmp_path / "o"),
            calibration=text_file,
            overrides=[override],
            **SIZES,
        )
    assert not (tmp_path / "o").exists()
