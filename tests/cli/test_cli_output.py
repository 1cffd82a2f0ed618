"""stdout is for machines, stderr for people; progress only where somebody watches."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from anybit.calibration.progress import silent
from anybit.cli.chat import converse
from anybit.cli.doctor import examine
from anybit.cli.generate import facts
from anybit.cli.ledger import mean_code_bits, stored_precisions
from anybit.cli.options import parse_size
from anybit.cli.output import print_json, say, say_table
from anybit.cli.progress import progress_bars
from anybit.engine.generate import GenerationResult
from anybit.engine.schedule import BitsAccount
from anybit.errors import InputError


def strict(text: str):
    def refuse(word: str):
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse)


def test_inspect_json_is_the_contract(anybit, checkpoint, ledger):
    done = anybit("inspect", checkpoint, "--json")
    assert (done.code, done.err) == (0, "")
    data = strict(done.out)
    assert data["bits_per_weight"] == 5.2
    assert [row["name"] for row in data["tensors"]] == [row["name"] for row in ledger["tensors"]]
    keys = {"name", "form", "planned", "actual", "bits_per_weight", "error", "kernel"}
    assert all(keys <= row.keys() for row in data["tensors"])
    assert data["tensors"][0]["form"] == "affine4g32"


def test_inspect_for_people_leaves_stdout_empty_and_shows_every_row(anybit, checkpoint, ledger):
    done = anybit("inspect", checkpoint)
    assert (done.code, done.out) == (0, "")
    assert all(row["name"] in done.err for row in ledger["tensors"])
    assert "5.200 bits per weight" in done.err


def test_inspect_json_stays_pure_beside_html(anybit, checkpoint, tmp_path):
    page = tmp_path / "deep" / "page.html"
    done = anybit("inspect", checkpoint, "--json", "--html", page)
    assert done.code == 0
    assert strict(done.out)["recipe"] == "gptq-w4"
    assert page.read_text().startswith("<!doctype html>")


def test_recipes_json_is_the_contract(anybit):
    done = anybit("recipes", "--json")
    assert (done.code, done.err) == (0, "")
    known = strict(done.out)
    assert {"gptq-w4", "rtn-w4"} <= {recipe["name"] for recipe in known}
    assert all({"name", "paper", "weights", "activations", "kv", "needs"} <= recipe.keys() for recipe in known)


def test_one_recipe_in_full(anybit):
    assert strict(anybit("recipes", "gptq-w4", "--json").out)["stages"]["weights"][0]["name"] == "gptq"
    done = anybit("recipes", "gptq-w4")
    assert done.out == ""
    assert "group_size: 32" in done.err


def test_json_has_no_nan_and_no_python_objects(capsys):
    print_json({"nan": math.nan, "inf": [-math.inf, 1.5], "path": Path("a/b"), "text": "é\n", "row": (1, None)})
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert strict(out) == {"nan": None, "inf": [None, 1.5], "path": "a/b", "text": "é\n", "row": [1, None]}


def test_text_for_people_is_not_markup(capsys):
    say("[bold]x[/bold] :smile: [/nope]")
    say_table(["[red]a"], [["[/x] :dog:"], [None]])
    err = capsys.readouterr().err
    assert "[bold]x[/bold] :smile: [/nope]" in err
    assert "[red]a" in err
    assert "[/x] :dog:" in err
    assert "\n-" in err


def test_no_progress_when_nobody_watches(capsys):
    with progress_bars() as progress:
        progress("work", 1, 2)
    assert progress is silent
    assert capsys.readouterr().err == ""


def test_progress_draws_stages_on_a_terminal():
    out = io.StringIO()
    with progress_bars(Console(file=out, force_terminal=True, width=120)) as progress:
        for done in range(4):
            progress("quantize blocks", done, 3)
        progress("evaluate", 1, 8)
    drawn = out.getvalue()
    assert "quantize blocks" in drawn
    assert "3/3" in drawn
    assert "1/8" in drawn


@pytest.mark.parametrize(
    ("text", "count"),
    [("1500000", 1_500_000), ("90MB", 90_000_000), ("8GiB", 8 << 30), ("1.5 kB", 1500), ("2tib", 2 << 40), ("7B", 7)],
)
def test_sizes(text, count):
    assert parse_size(text, "--max-size") == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1XB", "1 2", "1e9", "nan"])
def test_things_that_are_no_sizes(text):
    with pytest.raises(InputError, match="--max-size"):
        parse_size(text, "--max-size")


def test_mean_bits_weigh_tensors_by_size():
    rows = [
        {"name": "layers.0.q", "shape": [2, 8], "bits": 4},
        {"name": "layers.1.q", "shape": [2, 24], "bits": 8},
        {"name": "head", "shape": [100, 24], "bits": 8},
    ]
    assert mean_code_bits({"tensors": rows}) == pytest.approx((16 * 4 + 48 * 8) / 64)
    assert mean_code_bits({"tensors": rows[2:]}) == 8  # a model without blocks


def test_only_bits_that_all_blocks_share_are_a_precision():
    rows = [{"name": "layers.0.q", "bits": 4}, {"name": "layers.1.q", "bits": 4}, {"name": "head", "bits": 8}]
    assert stored_precisions({"tensors": rows}) == ["stored", "4"]
    rows[1]["bits"] = 3
    assert stored_precisions({"tensors": rows}) == ["stored"]


def result(text: str) -> GenerationResult:
    return GenerationResult(text, [1, 2, 3], 3, 7, 100.0, 12.5)


def test_generation_facts_are_the_contract():
    keys = (
        "text tokens prompt_tokens average_bits average_bits_paper prefill_tokens_per_second decode_tokens_per_second"
    )
    data = facts(result("Paris"), 4.5)
    assert set(data) == {*keys.split(), "drafted", "accepted", "passes", "bits", "guard"}
    assert (data["tokens"], data["prompt_tokens"], data["average_bits"], data["drafted"]) == (3, 7, 4.5, 0)
    nested = facts(replace(result("Paris"), bits=BitsAccount((4, 3, 3)), drafted=9, accepted=5), None)
    assert (nested["average_bits"], nested["average_bits_paper"], nested["bits"]) == (10 / 3, 3, {"4": 1, "3": 2})
    assert (nested["drafted"], nested["accepted"]) == (9, 5)


def test_chat_remembers_and_obeys_its_commands(capsys):
    heard = []

    def reply(messages):
        heard.append([dict(message) for message in messages])
        return result(f"answer {len(heard)}")

    lines = ["  hello ", "", "/stats", "/precision", "/precision 3", "/wat", "again", "/reset", "new", "/quit", "never"]
    left = converse(lines, reply, lambda spec: f"<{spec}> bits")
    roles = [[message["role"] for message in messages] for messages in heard]
    assert roles == [["user"], ["user", "assistant", "user"], ["user"]]
    assert heard[1][1]["content"] == "answer 1"
    assert heard[0][0]["content"] == "hello"
    assert [message["content"] for message in left] == ["new", "answer 3"]
    err = capsys.readouterr().err
    assert "12.5 tokens/s; 2 messages" in err
    assert "<> bits\n" in err
    assert "<3> bits\n" in err
    assert "unknown command /wat" in err


def test_doctor_goes_on_after_a_failure():
    def broken() -> str:
        raise RuntimeError("no such thing")

    first, second = examine([("a", broken, "do this"), ("b", lambda: "fine", "unused")])
    assert (first.ok, first.detail, first.fix) == (False, "RuntimeError: no such thing", "do this")
    assert (second.ok, second.detail, second.fix) == (True, "fine", "")
