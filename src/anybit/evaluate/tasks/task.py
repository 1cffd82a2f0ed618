"""What a task is: prompts in three splits that share no document, and how they are written for a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from anybit.errors import CalibrationError, InputError

SPLITS = ("train", "validation", "test")
_TURN = ("train", "test", "train", "validation", "train", "test")
"""Splits of six documents in a row."""
ASSISTANT = "You are a helpful assistant. "
STYLES = ("auto", "paper", "chat", "plain")


@dataclass(frozen=True)
class Example:
    """One prompt.

    Attributes:
        prompt: what is asked, without any template.
        reference: a person's answer where the data has one; else None and the float model's answer is the reference.
    """

    prompt: str
    reference: str | None = None


@dataclass(frozen=True)
class Task:
    """A named set of prompts.

    Attributes:
        about: one line for a person.
        length: most new tokens.
        source: where its documents come from, as `anybit quantize --calibration` names it.
        examples: split to its examples, in an order that never changes.
        plain: the prompt is text to go on with, not a question.
    """

    name: str
    about: str
    length: int
    source: str
    examples: Callable[[str], list[Example]]
    plain: bool = False


def split_documents(documents: Sequence[str], split: str) -> list[str]:
    """The documents of a split: half train, a third test, a sixth validation, dealt out in order.

    Raises:
        InputError: no such split.
    """
    if split not in SPLITS:
        raise InputError(f"no split '{split}'; known: {', '.join(SPLITS)}")
    return [document for at, document in enumerate(documents) if _TURN[at % len(_TURN)] == split]


def take(task: Task, split: str, count: int, calibration: str | None = None) -> list[Example]:
    """The first `count` examples of a split.

    Args:
        calibration: the text the checkpoint was calibrated on; a task must not be measured on it.

    Raises:
        InputError: too few examples, or the same text as the calibration's.
    """
    if calibration == task.source:
        raise InputError(
            f"task '{task.name}' is made from '{task.source}', which this checkpoint was calibrated on; use another task"
        )
    found = task.examples(split)
    if count < 1 or len(found) < count:
        raise InputError(f"task '{task.name}' has {len(found)} {split} examples, not {count}; lower --samples")
    return found[:count]


def encode(tokenizer: Any, task: Task, example: Example, style: str = "auto") -> list[int]:
    """Token ids of an example's prompt.

    Args:
        style: `paper`: Human / Assistant turns, whatever the model (methods/pmpd.md 2.6); `chat`: the tokenizer's template;
            `plain`: as it is; `auto`: plain for a plain task, else chat where there is a template, else paper.

    Raises:
        InputError: unknown style. CalibrationError: no chat template.
    """
    if style not in STYLES:
        raise InputError(f"no prompt style '{style}'; known: {', '.join(STYLES)}")
    template = getattr(tokenizer, "chat_template", None)
    if style == "auto":
        style = "plain" if task.plain else "chat" if template else "paper"
    if style == "chat":
        if not template:
            raise CalibrationError("this tokenizer has no chat template; use --prompt-style paper")
        messages = [{"role": "user", "content": example.prompt}]
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])
    text = example.prompt if style == "plain" else f"{ASSISTANT}\n\nHuman: {example.prompt}\n\nAssistant:"
    return list(tokenizer(text)["input_ids"])
