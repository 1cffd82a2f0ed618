"""The harness scores a checkpoint as it scores the float model with the values of its codes."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install anybit[lm-eval])")

from anybit.cli import main
from anybit.errors import InputError
from anybit.integrations.lm_eval import TASKS, AnybitLM, find_tasks, score
from anybit.integrations.tasks.documents import cloze, last_word, text
from nested_case import nest
from tiny_checkpoints import TEXT, quantize_tiny
from tiny_models import tiny_tokenizer

YAML = """
task: choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
PERPLEXITY = """
task: read
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with two tasks: answers chosen by a fixed rule, passages to read."""
    folder = tmp_path_factory.mktemp("tasks")
    words = TEXT.split()
    rows = [
        {"text": " ".join(words[i : i + 6]), "choices": [words[i + 6], words[i], "zebra"], "answer": i % 3}
        for i in range(12)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, yaml in (("choose", YAML), ("read", PERPLEXITY)):
        (folder / f"{name}.yaml").write_text(yaml.format(file=folder / "rows.jsonl"))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return quantize_tiny("llama", tmp_path_factory.mktemp("lm-eval"), config={"tie_word_embeddings": True})


def test_the_same_scores_as_transformers_on_dequantized_weights(checkpoint, tasks, tmp_path):
    dense = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).dequantize()
    dense.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    ours, theirs = (score(model, ["choose", "read"], task_path=tasks) for model in (checkpoint, tmp_path / "dense"))
    assert ours["choose"] == theirs["choose"]
    assert 0 < ours["choose"]["acc"] < 1
    assert ours["read"]["byte_perplexity"] == pytest.approx(theirs["read"]["byte_perplexity"], rel=1e-6)
    other = score(checkpoint.with_name("float"), ["read"], task_path=tasks)
    assert other["read"]["byte_perplexity"] != pytest.approx(ours["read"]["byte_perplexity"], rel=1e-4)


def test_precision_reaches_the_model(tmp_path, tasks):
    nested = nest(quantize_tiny("llama", tmp_path))
    full, low = (score(nested, ["read"], task_path=tasks, precision=bits) for bits in (None, 2))
    assert abs(full["read"]["byte_perplexity"] / low["read"]["byte_perplexity"] - 1) > 1e-4
    with pytest.raises(InputError, match="precision 7"):
        AnybitLM(str(nested), precision=7)


def test_the_command_line_prints_the_tasks(checkpoint, tasks, capsys):
    paths = ["--task-path", str(tasks)]
    assert main(["eval", str(checkpoint), "--tasks", "choose,read", *paths, "--limit", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tasks"]["choose"]["documents"] == 5
    assert set(found["tasks"]) == {"choose", "read"}


def test_unknown_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        find_tasks(["choose"], tmp_path / "nowhere")


@pytest.mark.slow  # only lm-eval's whole index can tell that a task is unknown
def test_unknown_tasks_are_refused_with_the_nearest(tasks):
    with pytest.raises(InputError, match="did you mean 'choose'"):
        find_tasks(["choos"], tasks)


def test_the_tasks_that_come_along_are_found():
    assert {path.stem for path in TASKS.glob("*.yaml")} <= set(find_tasks(["topics-cloze"]).all_tasks)


def test_cloze_asks_for_a_word_of_the_passage():
    assert last_word("one two three four five 6.") == ("one two three four", "five")
    assert last_word("a b c d 5 6 7 8") is None
    rows = cloze("topics", 30)["test"]
    assert len(rows) == 30
    assert rows[:] == cloze("topics", 30)["test"][:]
    for row in rows:
        assert len(set(row["choices"])) == 4
        assert row["choices"][row["answer"]].islower()
    assert len({row["answer"] for row in rows}) == 4
    assert len(text("topics", 5)["test"]) == 5
