"""The model guesses for itself: fewer bits of the same nested weights, checked by one pass with all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from anybit.layers.precision import Precision

Choose = Callable[[list[int], int], list[int]]
"""(tokens to append, position of the first new token) -> what the model chooses after each of them."""


class Cached(Protocol):
    """What of a `Stepper` is used here."""

    precision: Precision

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        ...

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        ...


class SelfDrafter:
    """Guesses by running the text on at a lower precision.

    The cache is the model's own: guessed tokens are appended to what the higher precision wrote, then forgotten, and the pass
    that checks them writes their keys and values again. Sampled texts draw each guess with the number that will draw the
    checked token, so both precisions agree wherever their distributions nearly do.
    """

    free = False

    def __init__(self, runner: Cached, choose: Choose, bits: int, longest: int = 7) -> None:
        """`bits`: precision of the guesses, one that the model offers."""
        self.longest, self.bits = longest, bits
        self._runner, self._choose = runner, choose
        self.start([])

    def start(self, prompt_ids: Sequence[int]) -> None:
        """See `Drafter`."""
        self._last, self._position = -1, 0

    def update(self, tokens: Sequence[int]) -> None:
        """See `Drafter`."""
        self._last, self._position = tokens[-1], self._position + len(tokens)

    @property
    def level(self) -> int:
        """1, or 0 while the text itself runs at this precision or less."""
        return int(self._runner.precision.bits > self.bits)

    def propose(self, limit: int) -> list[int]:
        """See `Drafter`. The precision and the cache are as before afterwards."""
        bits, length = self._runner.precision.bits, self._runner.length
        guess = [self._last]
        self._runner.precision.bits = self.bits
        for at in range(min(limit, self.longest)):
            guess += self._choose(guess[-1:], self._position + at)
        self._runner.precision.bits = bits
        self._runner.truncate(length)
        return guess[1:]


def draft_bits(available: Sequence[int], bits: int) -> int | None:
    """A precision to guess at for a text that runs at `bits`: the widest that is at most half of it, else the widest below;
    None where there is none."""
    below = [width for width in available if width < bits]
    return max((width for width in below if 2 * width <= bits), default=max(below, default=None))
