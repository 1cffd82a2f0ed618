"""Tasks over texts that install with a package, for machines without a network: always the same prompts.

The instructions are real, the reference is the float model's own answer: what is measured is what lower precision changes.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from functools import partial

from anybit.calibration.text import read_documents
from anybit.evaluate.tasks.task import Example, Task, split_documents

PASSAGE_WORDS = 110
PASSAGES_EACH = 24
"""Passages taken of one long document, so that none fills a split."""


def sentences(text: str) -> list[str]:
    """Sentences, roughly: cut after . ! or ? before a capital."""
    return [part.strip() for part in re.split(r"(?<=[.!?])\s+(?=[A-Z\"'])", text) if part.strip()]


def passages(document: str) -> list[str]:
    """Runs of whole paragraphs' words, `PASSAGE_WORDS` each, without headings."""
    prose = [line for line in document.split("\n") if len(line.split()) >= 12]
    words = " ".join(prose).split()
    return [
        " ".join(words[start : start + PASSAGE_WORDS])
        for start in range(0, len(words) - PASSAGE_WORDS + 1, PASSAGE_WORDS)
    ][:PASSAGES_EACH]


def shorten(text: str, limit: int) -> str:
    """Whole sentences up to `limit` words, at least one."""
    kept: list[str] = []
    for sentence in sentences(text):
        if kept and sum(len(s.split()) for s in [*kept, sentence]) > limit:
            break
        kept.append(sentence)
    return " ".join(kept)


def _news(prompt: Callable[[str], str | None], split: str) -> list[Example]:
    made = (prompt(document.strip()) for document in split_documents(read_documents("lee"), split))
    return [Example(text) for text in made if text is not None]


def _articles(prompt: Callable[[str], str | None], split: str) -> list[Example]:
    by_article = [passages(document) for document in split_documents(read_documents("wiki-test"), split)]
    deep = max(map(len, by_article), default=0)
    # one passage of every article, then the next: few examples already span all articles
    mixed = [article[at] for at in range(deep) for article in by_article if at < len(article)]
    made = map(prompt, mixed)
    return [Example(text) for text in made if text is not None]


def _summarise(text: str) -> str:
    return f"Summarize the following news article in two or three sentences.\n\n{shorten(text, 220)}"


def _continue(text: str) -> str:
    """A random length, always the same for a text: it makes prompts of varied difficulty (methods/pmpd.md 2.4)."""
    words = text.split()
    return " ".join(words[: random.Random(text).randint(30, len(words))])


def _extract(text: str) -> str:
    return f"List all people, places and organizations that this text mentions, one per line.\n\n{shorten(text, 120)}"


def _translate(text: str) -> str | None:
    found = [sentence for sentence in sentences(text) if 8 <= len(sentence.split()) <= 40][:2]
    return f"Translate this text into French.\n\n{' '.join(found)}" if found else None


TASKS: tuple[Task, ...] = (
    Task("summarise", "news articles in two or three sentences", 96, "lee", partial(_news, _summarise)),
    Task(
        "continue",
        "encyclopedia text, cut at random, to go on with",
        96,
        "wiki-test",
        partial(_articles, _continue),
        True,
    ),
    Task("extract", "names in encyclopedia text, one per line", 64, "wiki-test", partial(_articles, _extract)),
    Task("translate", "two sentences of news into French", 64, "lee", partial(_news, _translate)),
)
