"""A nested checkpoint on the command line: eval at a precision, what inspect says, what is refused."""

import json

import pytest

from anybit.cli.ledger import chosen_precision, nested_precisions, stored_precisions
from anybit.errors import InputError
from nested_case import nest
from tiny_checkpoints import quantize_tiny


@pytest.fixture(scope="module")
def nested(tmp_path_factory):
    return nest(quantize_tiny("llama", tmp_path_factory.mktemp("nested")), but=("embed",))


def evaluated(anybit, directory, *options):
    text = directory.parent / "text.txt"
    done = anybit("eval", directory, "--text", text, "--ctx", "32", "--max-tokens", "256", "--json", *options)
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_eval_at_a_precision(anybit, nested):
    import anybit as package

    whole, stored = evaluated(anybit, nested), evaluated(anybit, nested, "--precision", "stored")
    assert whole["perplexity"] == stored["perplexity"] == evaluated(anybit, nested, "--precision", "8")["perplexity"]
    low = evaluated(anybit, nested, "--precision", "2")
    assert (whole["precision"], low["precision"]) == (None, 2)
    assert low["perplexity"] != whole["perplexity"]
    options = {"text": str(nested.parent / "text.txt"), "ctx": 32, "max_tokens": 256}
    assert package.evaluate(nested, precision=2, **options)["perplexity"] == low["perplexity"]
    done = anybit("eval", nested, "--text", nested.parent / "text.txt", "--ctx", "32", "--precision", "3")
    assert "precision" in done.err
    assert "3 bits" in done.err


@pytest.mark.parametrize("precision", ["5", "16", "x", ""])
def test_a_precision_that_is_not_there_is_one_line_and_exit_2(anybit, nested, precision):
    done = anybit("eval", nested, "--text", "nowhere.txt", "--precision", precision)
    assert done.code == 2
    lines = done.err.strip().splitlines()
    assert len(lines) == 1
    assert f"--precision {precision}: not in this checkpoint; it can run at stored, 2, 3, 4, 6, 8" in lines[0]


def test_inspect_says_what_can_be_read(anybit, nested, checkpoint):
    assert "nested: can be read at 2, 3, 4, 6, 8 bits" in anybit("inspect", nested).err
    rows = json.loads(anybit("inspect", nested, "--json").out)["tensors"]
    assert {tuple(row["precisions"]) for row in rows} == {(2, 3, 4, 6, 8), (8,)}
    assert "nested" not in anybit("inspect", checkpoint).err  # a ledger from before there were any


def test_the_precisions_of_a_ledger():
    rows = [
        {"name": f"layers.{i}.q", "bits": 8, "precisions": widths} for i, widths in enumerate(([2, 4, 8], [2, 3, 8]))
    ]
    rows.append({"name": "head", "bits": 6, "precisions": [6]})
    ledger = {"tensors": rows}
    assert nested_precisions(ledger) == [2, 8]
    assert stored_precisions(ledger) == ["stored", "2", "8"]
    assert [chosen_precision(ledger, "--p", text) for text in (None, "stored", "2", "8")] == [None, None, 2, 8]
    with pytest.raises(InputError, match="--p 4: not in this checkpoint; it can run at stored, 2, 8"):
        chosen_precision(ledger, "--p", "4")
    single = {"tensors": [{"name": "layers.0.q", "bits": 4, "precisions": [4]}]}
    assert chosen_precision(single, "--p", "4") is None  # there is nothing to switch
