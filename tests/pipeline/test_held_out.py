"""Each precision's held-out perplexity in the ledger is what the finished checkpoint answers at that precision."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import anybit
from anybit.calibration.text import read_documents
from anybit.calibration.tokens import calibration_tokens
from anybit.checkpoint.ledger import Ledger
from anybit.formats.terms import dense, load_terms, precisions
from anybit.held_out import SAMPLES
from anybit.layers.linear import QuantLinear

SIZES = {"samples": 6, "seq_len": 48}


@pytest.fixture(scope="module")
def nested(float_dir, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("nested") / "out"
    overrides = ["weights.stream=4", "weights.group_size=16"]
    anybit.quantize(
        str(float_dir), recipe="pmpd", out=str(out), calibration=text_file, overrides=overrides, threads=1, **SIZES
    )
    return out


def held_out_perplexity(model, tokens):
    with torch.inference_mode():
        losses = [torch.nn.functional.cross_entropy(model(input_ids=t[None]).logits[0, :-1], t[1:]) for t in tokens]
    return math.exp(float(torch.stack(losses).mean()))


def test_the_ledger_says_what_the_model_answers(nested, float_dir, text_file):
    ledger = Ledger.read(nested)
    tokens = calibration_tokens(
        AutoTokenizer.from_pretrained(nested), read_documents(text_file), samples=6 + SAMPLES, seq_len=48, seed=0
    )
    assert ledger.identity["data"]["shape"] == [6, 48]
    assert list(ledger.precisions) == ["float", "2", "3", "4", "5", "6", "8"]
    for bits in (2, 4, 8):
        model = AutoModelForCausalLM.from_pretrained(nested, dtype=torch.float32)
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantLinear):
                plain = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
                width = bits if bits in precisions(module.form) else None  # the head has one width only
                plain.weight.data = dense(load_terms(module.form, dict(module.state_dict())), width)
                if module.bias is not None:
                    plain.bias.data = module.bias.data
                model.set_submodule(name, plain)
        assert held_out_perplexity(model, tokens[6:]) == pytest.approx(ledger.precisions[str(bits)], rel=1e-4)
    model = AutoModelForCausalLM.from_pretrained(float_dir, dtype=torch.float32)
    assert held_out_perplexity(model, tokens[6:]) == pytest.approx(ledger.precisions["float"], rel=1e-2)


def test_errors_by_precision_and_a_canary_at_full_precision(nested):
    rows = [row for row in Ledger.read(nested).tensors if row.errors]
    assert len(rows) == 14
    for row in rows:
        assert list(row.errors) == [2, 3, 4, 5, 6, 8]
        assert row.errors[8] == row.error
        assert row.errors[2] > row.errors[3] > row.errors[4] > row.errors[6]
    anybit.load(nested)  # asks the canary


def test_warned_when_more_bits_are_not_better(nested):
    ledger = Ledger.read(nested)
    widths = ["2", "3", "4", "5", "6", "8"]
    rises = sum(ledger.precisions[b] > ledger.precisions[a] for a, b in itertools.pairwise(widths))
    assert len(ledger.warnings) == rises


def test_an_interrupted_run_ends_in_the_same_bytes(nested, float_dir, text_file, tmp_path):
    out = tmp_path / "out"
    overrides = ["weights.stream=4", "weights.group_size=16"]

    def interrupt(stage, done, total):
        if done == 1:
            raise KeyboardInterrupt

    options = {"recipe": "pmpd", "out": str(out), "calibration": text_file, "overrides": overrides, "threads": 2}
    with pytest.raises(KeyboardInterrupt):
        anybit.quantize(str(float_dir), progress=interrupt, **options, **SIZES)
    anybit.quantize(str(float_dir), resume=True, **options, **SIZES)
    for file in sorted(nested.iterdir()):
        assert file.read_bytes() == (out / file.name).read_bytes(), file.name


def test_nothing_is_held_out_without_nested_weights(float_dir, text_file, tmp_path):
    anybit.quantize(str(float_dir), recipe="rtn-w4", out=str(tmp_path / "out"), calibration=text_file, **SIZES)
    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text())
    assert ledger["precisions"] == {}
    assert ledger["warnings"] == []
