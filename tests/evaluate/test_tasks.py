"""Tasks: always the same prompts, splits that share nothing."""

from __future__ import annotations

import importlib.util
import itertools
from types import SimpleNamespace

import pytest

from anybit.errors import CalibrationError, InputError
from anybit.evaluate.tasks.find import find_task
from anybit.evaluate.tasks.local import TASKS, passages, sentences, shorten
from anybit.evaluate.tasks.task import SPLITS, Example, Task, encode, split_documents, take
from tiny_models import tiny_tokenizer


def test_splits_share_no_document() -> None:
    documents = [str(at) for at in range(300)]
    parts = [split_documents(documents, split) for split in SPLITS]
    assert [len(part) for part in parts] == [150, 50, 100]
    assert sorted(itertools.chain(*parts), key=int) == documents
    with pytest.raises(InputError, match="no split 'dev'"):
        split_documents(documents, "dev")


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_local_tasks(task: Task) -> None:
    if importlib.util.find_spec("gensim") is None:
        pytest.skip("the texts are data files of the gensim wheel")
    found = {split: task.examples(split) for split in SPLITS}
    assert found["test"] == task.examples("test")
    assert [len(found[split]) >= least for split, least in (("train", 64), ("validation", 40), ("test", 100))] == [
        True
    ] * 3
    prompts = [example.prompt for split in SPLITS for example in found[split]]
    assert len(set(prompts)) == len(prompts)
    assert all(20 < len(prompt) < 2500 for prompt in prompts)


def test_no_task_on_the_calibration_text() -> None:
    task = Task("x", "", 9, "lee", lambda split: [Example("a"), Example("b")])
    assert take(task, "test", 2, "wiki") == [Example("a"), Example("b")]
    with pytest.raises(InputError, match="calibrated on"):
        take(task, "test", 2, "lee")
    with pytest.raises(InputError, match="has 2 test examples, not 3"):
        take(task, "test", 3)


def test_styles() -> None:
    tokenizer, task = tiny_tokenizer(), find_task("summarise")
    text = tokenizer.decode(encode(tokenizer, task, Example("Why?")))
    assert text == "You are a helpful assistant. \n\nHuman: Why?\n\nAssistant:"
    assert tokenizer.decode(encode(tokenizer, find_task("continue"), Example("Once"))) == "Once"
    with pytest.raises(CalibrationError, match="no chat template"):
        encode(tokenizer, task, Example("x"), "chat")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    assert tokenizer.decode(encode(tokenizer, task, Example("Why?"))) == "<Why?>"
    with pytest.raises(InputError, match="no prompt style"):
        encode(tokenizer, task, Example("x"), "other")


def test_text_is_cut_whole() -> None:
    text = "One is here. Two comes after! Is three the last? It is."
    assert sentences(text) == ["One is here.", "Two comes after!", "Is three the last?", "It is."]
    assert shorten(text, 7) == "One is here. Two comes after!"
    assert shorten(text, 1) == "One is here."
    document = "Heading\n" + "\n".join(" ".join(f"w{i}" for i in range(at * 60, at * 60 + 60)) for at in range(5))
    assert [len(part.split()) for part in passages(document)] == [110, 110]
    assert "Heading" not in passages(document)[0]


def test_unknown_task() -> None:
    with pytest.raises(InputError, match="did you mean 'summarise'"):
        find_task("sumarise")


def test_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_, **__):
        raise ConnectionError("no route\nmore lines")

    datasets = SimpleNamespace(load_dataset=offline)
    before = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name: datasets if name == "datasets" else before(name))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(CalibrationError, match=r"cannot load 'knkarthick/dialogsum' \(no route\); check the network"):
        find_task("dialogsum").examples("test")
