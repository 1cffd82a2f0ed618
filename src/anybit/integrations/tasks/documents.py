"""Documents of the local tasks, made from texts that install with a package; the same on every machine.

`cloze` asks for the last word of a passage, among the last words of three other passages; `text` is the passages themselves.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from datasets import Dataset

from anybit.calibration.text import read_documents
from anybit.evaluate.tasks.local import passages

CHOICES = 4
SHORTEST = 4
"""Letters of a word that is asked for: shorter ones are mostly grammar."""


def cloze(source: str, count: int, **_: object) -> dict[str, Dataset]:
    """{"test": {text, choices, answer}}, at most `count` of them, from the builtin text or file `source`."""
    pairs = [pair for passage in _passages(source) if (pair := last_word(passage))]
    words, draw = sorted({word for _, word in pairs}), random.Random(0)
    rows = []
    for text, word in draw.sample(pairs, min(count, len(pairs))):
        choices = [word, *draw.sample([other for other in words if other != word], CHOICES - 1)]
        draw.shuffle(choices)
        rows.append({"text": text, "choices": choices, "answer": choices.index(word)})
    return {"test": Dataset.from_list(rows)}


def text(source: str, count: int, **_: object) -> dict[str, Dataset]:
    """{"test": {text}}: at most `count` passages of `source`."""
    found = _passages(source)
    return {
        "test": Dataset.from_list([{"text": one} for one in random.Random(0).sample(found, min(count, len(found)))])
    }


def last_word(passage: str) -> tuple[str, str] | None:
    """A passage up to its last long lower-case word, and that word; None where there is none."""
    words = passage.split()
    at = next((i for i in range(len(words) - 1, len(words) // 2, -1) if _asked(words[i])), None)
    return None if at is None else (" ".join(words[:at]), words[at])


def _asked(word: str) -> bool:
    return word.isascii() and word.isalpha() and word.islower() and len(word) >= SHORTEST


def _passages(source: str) -> Sequence[str]:
    return [passage for document in read_documents(source) for passage in passages(document)]
