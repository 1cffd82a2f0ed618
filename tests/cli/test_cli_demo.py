"""The demo calls the right things in the right order and reports what they said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anybit.cli.demo import QUICK, Size, Steps, check_out, run_demo
from anybit.engine.generate import GenerationResult
from anybit.errors import InputError

CONTRACT = "model recipe perplexity_float perplexity bits_per_weight size_bytes decode_tokens_per_second text report"
QUALITY = {
    "perplexity": 18.0,
    "stderr": 0.5,
    "tokens": 8176,
    "ctx": 512,
    "baseline_perplexity": 16.0,
    "kl_mean": 0.08,
    "kl_noise_floor": 0.001,
    "top1_agreement": 0.875,
}


class Library:
    """Stands in for the library and writes down what it was asked."""

    def __init__(self, ledger):
        self.ledger, self.calls = ledger, []

    def quantize(self, model, *, out, recipe, **options):
        self.calls.append(("quantize", model, recipe, options))
        options["progress"]("quantize blocks", 1, 1)
        directory = Path(out)
        directory.mkdir(parents=True)
        path = directory / "ledger.json"
        path.write_text(json.dumps(self.ledger))
        made = {"bits_per_weight": 5.2, "size_bytes": 5200, "seconds": 1.5, "peak_rss_bytes": 10**9}
        return {"recipe": recipe, "ledger": str(path), **made}

    def evaluate(self, directory, **options):
        self.calls.append(("evaluate", directory.name, options["text"], options))
        return QUALITY

    def generate(self, model, prompt, new_tokens):
        self.calls.append(("generate", str(model), prompt, new_tokens))
        speed = 10.0 if model == "demo" else 25.0
        return GenerationResult("float words" if model == "demo" else "<b>words</b>", [1], 1, 9, 50.0, speed)


@pytest.fixture
def library(ledger):
    return Library(ledger)


def demo(library, out, amount=QUICK):
    steps = Steps(library.quantize, library.evaluate, library.generate)
    stages = []
    data = run_demo(out, "rtn-w4", amount, steps, lambda stage, *_: stages.append(stage), resume=False, overwrite=False)
    return data, stages


def test_result_is_the_contract(library, tmp_path):
    data, stages = demo(library, tmp_path / "out")
    assert set(CONTRACT.split()) <= data.keys()
    assert (data["perplexity_float"], data["perplexity"]) == (16.0, 18.0)
    assert (data["text"], data["text_float"]) == ("<b>words</b>", "float words")
    assert data["decode_tokens_per_second"] == 25.0
    assert set(stages) == {"quantize blocks", "generate"}
    json.dumps(data)


def test_steps_see_the_same_checkpoint_prompt_and_amount(library, tmp_path):
    demo(library, tmp_path / "out", Size())
    quantize, evaluate, first, second = library.calls
    assert quantize[:3] == ("quantize", "demo", "rtn-w4")
    assert (quantize[3]["samples"], quantize[3]["seq_len"]) == (32, 512)
    assert evaluate[:3] == ("evaluate", "checkpoint", "wiki-test")
    assert (evaluate[3]["baseline"], evaluate[3]["ctx"], evaluate[3]["max_tokens"]) == ("demo", 512, 16 * 512)
    assert first[1] == "demo"
    assert second[1] == str(tmp_path / "out" / "checkpoint")
    assert first[2:] == second[2:]


def test_report_is_written_where_the_result_says(library, tmp_path):
    data, _ = demo(library, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert data["report"] == str(tmp_path / "out" / "report.html")
    assert "&lt;b&gt;words&lt;/b&gt;" in page
    assert "Perplexity 18.00 against 16.00 in float: +12.5 %" in page
    assert "anybit demo --recipe rtn-w4 --quick" in page
    assert not list((tmp_path / "out").glob("*.partial"))


def test_a_place_with_files_is_refused_unless_allowed(tmp_path):
    check_out(tmp_path / "new", resume=False, overwrite=False)
    check_out(tmp_path, resume=False, overwrite=False)  # empty
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(InputError, match=r"not empty.*--overwrite"):
        check_out(tmp_path, resume=False, overwrite=False)
    check_out(tmp_path, resume=True, overwrite=False)
    check_out(tmp_path, resume=False, overwrite=True)
    with pytest.raises(InputError, match="is a file"):
        check_out(tmp_path / "mine.txt", resume=False, overwrite=True)
