"""What the decode loop needs of whoever guesses tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Drafter(Protocol):
    """Guesses the next tokens of one text from what is certain; a wrong guess costs time, never a different text.

    Attributes:
        longest: most tokens worth guessing at once.
        level: how much the next guess rests on, 0: there is none. Guesses of one level are judged together (`Pace`).
    """

    longest: int

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
