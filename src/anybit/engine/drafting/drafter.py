"""What the decode loop needs of whoever guesses tokens, and what drafters are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from anybit.errors import InputError

NAMES = ("none", "ngram", "lookup", "self")


def check_name(draft: str, available: Sequence[int]) -> None:
    """Raise InputError unless `draft` is one of `NAMES`, or `self:BITS`, and fits a checkpoint of the `available` precisions
    (fewer than two: it is not nested)."""
    name, colon, bits = draft.partition(":")
    if name not in NAMES or (colon and name != "self"):
        raise InputError(f"--draft {draft}: unknown; known: {', '.join(NAMES)}, self:BITS")
    if name == "self" and len(available) < 2:
        raise InputError(
            "--draft self: this checkpoint is not nested, it has no lower precision to guess at; "
            "quantize with a nested recipe (pmpd, any-precision, anybcq), or use --draft ngram"
        )
    if colon and bits not in map(str, available):
        raise InputError(f"--draft {draft}: this checkpoint holds {list(available)} bits")


class Drafter(Protocol):
    """Guesses the next tokens of one text from what is certain; a wrong guess costs time, never a different text.

    Attributes:
        longest: most tokens worth guessing at once.
        free: guessing takes no time beside a pass.
        level: how much the next guess rests on, 0: there is none. Guesses of one level are judged together (`Pace`).
    """

    longest: int
    free: bool

    @property
    def level(self) -> int:
        """See above."""
        ...

    def start(self, prompt_ids: Sequence[int]) -> None:
        """Begin a text with its prompt; nothing is left of the text before."""
        ...

    def propose(self, limit: int) -> list[int]:
        """At most `limit` tokens that may follow; changes nothing."""
        ...

    def update(self, tokens: Sequence[int]) -> None:
        """These tokens were added to the text for certain."""
        ...
