"""How many guessed tokens are worth checking: passes are timed, guesses are counted, and losses are limited.

Nothing here changes a token: a guess that is cut or left out only costs speed.
"""

from __future__ import annotations

import statistics
from collections import defaultdict, deque

_SLOPE = 0.15  # of a pass for each further row, until rows have been timed
_REMEMBERED = 9  # times of one kind whose median counts
_FORGET = 0.9  # what a count is worth one guess later
_PRIOR = (1.0, 2.0)  # tokens right and tokens checked, before there are any
_INCOME = 0.01  # share of the time that guessing may lose in the long run
_WEALTH = 2.0  # plain passes: gains beyond them are not saved for bad times


class Pace:
    """Chooses the length of a guess that gives most tokens a second, and none when that is best.

    With a the share of a level's guessed tokens that were right, k of them give E = a + a^2 + ... + a^k tokens beside the one
    that every pass gives: the best k has the largest (1 + E) / (time of k + 1 rows + time of guessing k).

    What guessing gains and loses against plain passes of the median time is kept in an account, which starts with `allowance`
    plain passes and earns 1 % of all time. A guess whose complete failure it could not pay is not made. So a text in which
    nothing can be foreseen takes at most 1.01 times as long as without guessing, and `allowance` passes; failures make the
    next try wait.
    """

    def __init__(self, allowance: float = 0.5) -> None:
        """`allowance`: plain passes that may be lost at the start."""
        self._times: dict[tuple[int, int], deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))
        self._guessing: deque[float] = deque(maxlen=_REMEMBERED)  # seconds a token
        self._right: dict[int, tuple[float, float]] = defaultdict(lambda: _PRIOR)
        self._allowance = allowance
        self._account = 0.0  # plain passes, without the allowance

    def length(self, level: int, bits: int, most: int) -> int:
        """How many of at most `most` tokens to guess at `level`, for a pass at `bits`."""
        if level == 0 or most < 1:
            return 0
        right, checked = self._right[level]
        share, expected = right / checked, 0.0
        best, best_rate = 0, 1.0
        for count in range(1, most + 1):
            expected += share**count
            cost = self._cost(bits, count)
            if cost - 1 > self._account + self._allowance:
                break
            rate = (1 + expected) / cost
            if rate > best_rate:
                best, best_rate = count, rate
        if best == 0 and self._account > 0:  # nothing promises a gain, but there is money for a try
            best = 1 if self._cost(bits, 1) - 1 <= self._account else 0
        return best

    def passed(self, bits: int, rows: int, seconds: float) -> None:
        """A pass over `rows` tokens took this long."""
        self._times[bits, rows].append(seconds)
        self._account = min(self._account + _INCOME, _WEALTH)

    def judged(self, level: int, bits: int, guessed: int, right: int, seconds: float) -> None:
        """`guessed` tokens took `seconds` to guess, and the pass after them found the first `right` of them right."""
        if not guessed:
            return
        self._guessing.append(seconds / guessed)
        so_far, checked = self._right[level]
        self._right[level] = (
            so_far * _FORGET + right,
            checked * _FORGET + min(right + 1, guessed),
        )
        self._account = min(self._account + 1 + right - self._cost(bits, guessed), _WEALTH)

    def _cost(self, bits: int, guessed: int) -> float:
        """Plain passes that guessing and checking this many tokens takes."""
        plain = self._seconds(bits, 1)
        guessing = statistics.median(self._guessing) * guessed if self._guessing else 0.0
        return (self._seconds(bits, guessed + 1) + guessing) / plain if plain else 1 + _SLOPE * guessed

    def _seconds(self, bits: int, rows: int) -> float:
        """Median time of a pass, from the nearest number of rows that was timed; 0.0 where none was."""
        if times := self._times.get((bits, rows)):
            return statistics.median(times)
        timed = [known for (width, known), times in self._times.items() if width == bits and times]
        if not timed:
            return 0.0
        nearest = min(timed, key=lambda known: (abs(known - rows), known))
        return statistics.median(self._times[bits, nearest]) * (1 + _SLOPE * (rows - 1)) / (1 + _SLOPE * (nearest - 1))
