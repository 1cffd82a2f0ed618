"""How many guessed tokens are worth checking: passes are timed, guesses are counted, and losses are limited.

Nothing here changes a token: a guess that is cut or left out only costs speed.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

from anybit.engine.drafting.pass_times import PassTimes

_REMEMBERED = 9  # times of guessing whose median counts
_WEIGHT = 8.0  # guessed tokens that the expected share of right ones is worth
_FORGET = 0.97  # what a count is worth one guess later
_INCOME = 0.005  # share of the time that guessing may lose in the long run
_UNLIKELY = 0.04  # that a guess is right so far: no use in looking further
_PAPER = 0.1  # what a gain or loss is worth that would have been
_WEALTH = 2.0  # plain passes: gains beyond them are not saved for bad times
_TIMED = 4  # one in so many passes without a guess: all of them would cost 0.4 % of a small model's

REPEATS = (0.4, 0.65, 0.8, 0.9)
"""Share of the tokens that were right after a context of 1, 2, 3 and 4 tokens: articles and copies, 135 M (NOTES.md)."""


class Pace:
    """Chooses the length of a guess that gives most tokens a second, and none when that is best.

    With a_j the share of right tokens among those guessed at the level of place j, k of them give E = a_1 + a_1 a_2 + ... tokens
    beside the one that every pass gives: the best k has the largest (1 + E) / (time of k + 1 rows + time of guessing k).

    What guessing gains and loses against plain passes is kept in an account, which starts with `allowance`
    plain passes and earns 0.5 % of all time. A guess whose complete failure it could not pay is not made. So a text in which
    nothing can be foreseen takes hardly more than 1.005 times as long as without guessing, and `allowance` passes; failures make
    the next try wait.
    """

    def __init__(
        self,
        expected: Sequence[float] = REPEATS,
        times: PassTimes | None = None,
        allowance: float = 0.5,
        tries: bool = False,
    ) -> None:
        """What is known before the text begins.

        Args:
            expected: share of right tokens at levels 1, 2, ...; a place after a right guess is one level deeper, up to the last.
            times: of earlier passes of the same model; default: none.
            allowance: plain passes that may be lost at the start.
            tries: whether to guess, as far as the account allows, where no gain is expected: for guesses that cannot be
                `seen` without being made.
        """
        self._tries = tries
        self._expected, self._times, self._allowance = expected, times or PassTimes(), allowance
        self._counts = [(_WEIGHT * share, _WEIGHT) for share in expected]  # right and checked, of each level
        self._guessing: deque[float] = deque(maxlen=_REMEMBERED)  # seconds a token
        self._account = 0.0  # plain passes, without the allowance
        self._plain = 0  # passes without a guess

    def length(self, level: int, bits: int, most: int) -> int:
        """How many of at most `most` tokens to guess at `level`, for a pass at `bits`."""
        plain, guessing = self._times.seconds(bits, 1), self._seconds_a_token()
        if level == 0 or most < 1 or not plain:  # gains are measured by plain passes
            return 0
        right, expected = 1.0, 1.0
        best, best_rate = 0, 1.0
        for count in range(1, most + 1):
            so_far, checked = self._counts[self._index(level, count - 1)]
            right *= so_far / checked
            if right < _UNLIKELY:
                break
            expected += right
            cost = self._cost(bits, count, plain, guessing)
            if cost - 1 > self._account + self._allowance:
                break
            if expected > best_rate * cost:
                best, best_rate = count, expected / cost
        if best == 0 and self._tries and self._cost(bits, 1, plain, guessing) - 1 <= self._account:
            return 1  # nothing promises a gain, but there is money for a try
        return best

    def passed(self, bits: int, rows: int, seconds: float) -> None:
        """A pass over `rows` tokens took this long."""
        if rows > 1 or self._plain % _TIMED == 0 or not self._times.seconds(bits, 1):
            self._times.passed(bits, rows, seconds)
        self._plain += rows == 1
        self._account = min(self._account + _INCOME, _WEALTH)

    def judged(self, level: int, bits: int, guessed: int, right: int, seconds: float) -> None:
        """`guessed` tokens took `seconds` to guess, and the pass after them found the first `right` of them right."""
        if not guessed:
            return
        self._guessing.append(seconds / guessed)
        self._count(level, min(right + 1, guessed), right)
        cost = self._cost(bits, guessed, self._times.seconds(bits, 1), self._seconds_a_token())
        self._account = min(self._account + 1 + right - cost, _WEALTH)

    def seen(self, level: int, bits: int, right: bool) -> None:
        """A token that was guessed but not given to the pass would have been right, or not.

        A tenth of what it would have gained goes to the account, and of what it would have lost, but not below what was
        allowed to be lost: else an account once used up would keep a text that begins to repeat from being noticed.
        """
        self._count(level, 1, int(right))
        cost = self._cost(bits, 1, self._times.seconds(bits, 1), self._seconds_a_token())
        floor = min(self._account, -self._allowance)
        self._account = min(max(self._account + _PAPER * (1 + right - cost), floor), _WEALTH)

    def _count(self, level: int, checked: int, right: int) -> None:
        for place in range(checked):
            at = self._index(level, place)
            so_far, known = self._counts[at]
            self._counts[at] = so_far * _FORGET + (place < right), known * _FORGET + 1

    def _index(self, level: int, place: int) -> int:
        return min(level + place, len(self._expected)) - 1

    def _seconds_a_token(self) -> float:
        return statistics.median(self._guessing) if self._guessing else 0.0

    def _cost(self, bits: int, guessed: int, plain: float, guessing: float) -> float:
        """Plain passes that guessing and checking this many tokens takes."""
        return (self._times.seconds(bits, guessed + 1) + guessing * guessed) / plain
