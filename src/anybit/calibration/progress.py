"""How long work reports that it moves: one callable, no display code in the library."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """`progress(stage, done, total)`: `done` of `total` steps of `stage` are finished, 0 <= done <= total.

    Called often, so it must be cheap; the caller of a library function decides whether and how to draw it.
    """

    def __call__(self, stage: str, done: int, total: int) -> None: ...


def silent(stage: str, done: int, total: int) -> None:
    """The progress of someone who does not want to be told."""
