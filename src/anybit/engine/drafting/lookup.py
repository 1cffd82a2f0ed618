"""Prompt lookup (methods/anpd.md 2.5): what followed the last place where the text read the same."""

from __future__ import annotations

from collections.abc import Sequence


class LookupDrafter:
    """Finds the longest suffix of the text, of `shortest` to `deepest` tokens, that occurred before, and copies on from there.

    An index of runs makes that O(deepest) a token, however long the text is.
    """

    free = True

    def __init__(self, longest: int = 7, shortest: int = 1, deepest: int = 4, first: bool = False) -> None:
        """How a guess is found.

        Args:
            longest: most tokens in a guess.
            shortest, deepest: tokens that must read the same; the most that do are tried first.
            first: copy from the earliest such place, as the original does, instead of the latest.
        """
        if not 1 <= shortest <= deepest:
            raise ValueError(f"need 1 <= shortest <= deepest, not {shortest} and {deepest}")
        self.longest, self._lengths, self._first = longest, range(deepest, shortest - 1, -1), first
        self.start([])

    def start(self, prompt_ids: Sequence[int]) -> None:
        """See `Drafter`."""
        self._ids: list[int] = []
        self._follows: dict[tuple[int, ...], int] = {}  # a run of tokens -> where the token after it stands
        self._match = (0, 0)
        self.update(prompt_ids)

    def update(self, tokens: Sequence[int]) -> None:
        """See `Drafter`."""
        ids = self._ids
        for token in tokens:
            end = len(ids)  # runs that end here are known from now on, as something follows them
            for length in self._lengths:
                if length <= end:
                    run = tuple(ids[end - length :])
                    if not (self._first and run in self._follows):
                        self._follows[run] = end
            ids.append(token)
        self._match = self._find()

    @property
    def level(self) -> int:
        """Tokens that read the same."""
        return self._match[0]

    def propose(self, limit: int) -> list[int]:
        """See `Drafter`. A match that reaches into its own guess goes round in it."""
        length, place = self._match
        guess: list[int] = []
        for at in range(place, place + min(limit, self.longest) if length else place):
            guess.append(self._ids[at] if at < len(self._ids) else guess[at - len(self._ids)])
        return guess

    def _find(self) -> tuple[int, int]:
        end = len(self._ids)
        for length in self._lengths:
            if length <= end and (place := self._follows.get(tuple(self._ids[end - length :]))) is not None:
                return length, place
        return 0, 0
