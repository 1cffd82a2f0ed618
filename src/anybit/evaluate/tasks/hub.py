"""The paper's tasks, from the Hugging Face hub when a network is there (methods/pmpd.md 2.6)."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

from anybit.errors import CalibrationError
from anybit.evaluate.tasks.task import Example, Task

Row = dict[str, Any]


def _rows(name: str, config: str | None, split: str) -> list[Row]:
    """All rows of a split.

    Raises:
        CalibrationError: no `datasets` package, no network, no such data.
    """
    if importlib.util.find_spec("datasets") is None:
        raise CalibrationError(f"task data '{name}' needs the datasets package: run `pip install anybit[data]`")
    try:
        return list(importlib.import_module("datasets").load_dataset(name, config, split=split))
    except Exception as error:  # the hub's clients raise many kinds of error for "no network"
        first = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise CalibrationError(
            f"cannot load '{name}' ({first}); check the network, or use a local task such as summarise"
        ) from error


def _examples(name: str, config: str | None, example: Callable[[Row], Example | None], split: str) -> list[Example]:
    made = (example(row) for row in _rows(name, config, split))
    return [one for one in made if one is not None]


def _cnn(row: Row) -> Example:
    return Example(f"Summarize the following article in around 3 sentences.\n\n{row['article']}", row["highlights"])


def _dialog(row: Row) -> Example:
    return Example(f"Summarize the following dialogue in 1 to 2 sentences.\n\n{row['dialogue']}", row["summary"])


def _iwslt(row: Row) -> Example | None:
    """Only long items: the paper keeps those of more than 60 tokens, about 45 words."""
    pair = row["translation"]
    if len(pair["en"].split()) <= 45:
        return None
    return Example(f"Translate the following French text into English.\n\n{pair['fr']}", pair["en"])


def _mt_bench(split: str) -> list[Example]:
    """First turns, dealt out: the set has one split of 80 questions, and answers are compared with the float model's."""
    rows = _rows("HuggingFaceH4/mt_bench_prompts", None, "train")
    part = {"train": rows[0::3], "validation": rows[1::3], "test": rows[2::3]}[split]
    return [Example(row["prompt"][0]) for row in part]


TASKS: tuple[Task, ...] = (
    Task("cnn-dm", "CNN/DailyMail 3.0.0, about three sentences", 256, "hf:cnn_dailymail:3.0.0",
         partial(_examples, "abisee/cnn_dailymail", "3.0.0", _cnn)),
    Task("dialogsum", "DialogSum, one or two sentences", 33, "hf:knkarthick/dialogsum",
         partial(_examples, "knkarthick/dialogsum", None, _dialog)),
    Task("iwslt-fr-en", "IWSLT 2017 French to English, long items", 60, "hf:iwslt2017",
         partial(_examples, "IWSLT/iwslt2017", "iwslt2017-fr-en", _iwslt)),
    Task("mt-bench", "MT-Bench, first turns, beside the float model", 256, "hf:mt_bench", _mt_bench),
)  # fmt: skip
