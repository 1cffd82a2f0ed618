"""Texts of the float model: batches equal single texts, and nothing is made twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from anybit.evaluate.references import FloatModel, TextStore, until_end
from tiny_models import save_tiny

PROMPTS = [[10, 20, 30], list(range(40, 60)), [99], [5, 6, 7, 8, 9, 10, 11]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float")
    save_tiny("llama", path)
    return path


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ANYBIT_CACHE", str(tmp_path))


def slowly(model, prompt: list[int], length: int, ends: frozenset[int]) -> list[int]:
    """No cache, no batch, no padding."""
    text: list[int] = []
    with torch.inference_mode():
        while len(text) < length and not (text and text[-1] in ends):
            text.append(int(model(torch.tensor([prompt + text])).logits[0, -1].argmax()))
    return text


def test_batched_texts_equal_slow_ones(directory: Path) -> None:
    source = FloatModel(str(directory))
    free = [slowly(source.model, prompt, 12, frozenset()) for prompt in PROMPTS]
    ends = frozenset({free[0][5], free[1][3]})  # tokens that do come, so that some texts end early
    found = source.texts(PROMPTS, 12, ends)
    assert found == [slowly(source.model, prompt, 12, ends) for prompt in PROMPTS]
    assert len({len(text) for text in found}) > 1


def test_texts_are_kept(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = FloatModel(str(directory)).texts(PROMPTS, 6, frozenset({2}))
    monkeypatch.setattr(FloatModel, "_generate", None)
    assert FloatModel(str(directory)).texts(PROMPTS, 6, frozenset({2})) == first
    for other in (FloatModel(str(directory), "bfloat16"), FloatModel(str(directory))):
        with pytest.raises(TypeError):
            other.texts(PROMPTS, 6 if other.dtype == "bfloat16" else 7, frozenset({2}))


def test_logits_predict_the_text(directory: Path) -> None:
    source = FloatModel(str(directory))
    text = slowly(source.model, PROMPTS[0], 9, frozenset())
    logits = source.logits(PROMPTS[0], text)
    assert logits.shape == (9, source.model.config.vocab_size)
    assert logits.argmax(-1).tolist() == text
    assert source.vectors(text).shape == (9, 64)
    assert np.isfinite(source.vectors(text)).all()


def test_a_torn_file_costs_one_text(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    store = TextStore(path)
    store.put([1], [4, 5])
    store.put([1], [6], "other way")
    store.put([2], [7])
    path.write_text(path.read_text()[:-3])
    again = TextStore(path)
    assert again.get([1]) == [4, 5]
    assert again.get([1], "other way") == [6]
    assert again.get([2]) is None
    again.put([2], [7])
    assert TextStore(path).get([2]) == [7]


def test_until_end() -> None:
    assert until_end([3, 4, 2, 2, 9], frozenset({2})) == [3, 4, 2]
    assert until_end([3, 4], frozenset({2})) == [3, 4]
