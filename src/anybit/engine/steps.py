"""One text between passes: what the next pass takes in, and what its outputs make certain.

A pass takes in the last certain token y and guesses d1..dk. What the model chooses after each is kept as long as the guess before
it was right. A pass has one precision and never crosses a step where that changes, so the text depends on the schedule alone, not
on the guesses. Whoever runs the passes, one text at a time (`loop.py`) or many together, forgets what was guessed wrong.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from anybit.engine.drafting.drafter import Drafter
from anybit.engine.drafting.pace import Pace
from anybit.engine.guard import Guard
from anybit.engine.schedule import Features, Scheduler, ScheduleState

Floats = NDArray[np.float32]


@dataclass
class Drafting:
    """Who guesses, and how much of it is used.

    Attributes:
        drafter: see there.
        pace: cuts guesses to what pays; None: they are used whole.
        drafted, accepted: tokens guessed and checked, and those that were right.
        offered, right: guesses that were checked, and right, at each place in a guess, [drafter.longest].
    """

    drafter: Drafter
    pace: Pace | None = None
    drafted: int = 0
    accepted: int = 0
    offered: list[int] = field(default_factory=list)
    right: list[int] = field(default_factory=list)
    _unused: list[int] = field(default_factory=list)  # a guess that is not checked, but can be compared

    def __post_init__(self) -> None:
        self.offered, self.right = [0] * self.drafter.longest, [0] * self.drafter.longest

    def length(self, level: int, bits: int, most: int) -> int:
        """How many of at most `most` tokens to guess at `level` for a pass at `bits`."""
        most, self._unused = min(most, self.drafter.longest), []
        if self.pace is None or most < 1:
            return max(most, 0)
        chosen = self.pace.length(level, bits, most) if level else 0
        if chosen < 1 and level and self.drafter.free:
            self._unused = self.drafter.propose(1)
        return chosen

    def guess(self, most: int) -> tuple[list[int], float]:
        """At most `most` tokens, and the seconds it took to guess them."""
        if most < 1:
            return [], 0.0
        began = time.perf_counter()
        return self.drafter.propose(most)[:most], time.perf_counter() - began

    def judge(self, level: int, bits: int, guessed: int, news: Sequence[int], seconds: float) -> None:
        """Count a guess that a pass checked, or could have; `news`: the tokens it was followed by."""
        right = len(news) - 1
        if self.pace is not None and self._unused:
            self.pace.seen(level, bits, self._unused[0] == news[0])
        self.drafted, self.accepted = self.drafted + guessed, self.accepted + right
        for place in range(guessed):
            self.offered[place] += 1
            self.right[place] += place < right
        if self.pace is not None:
            self.pace.judged(level, bits, guessed, right, seconds)


class Choose(Protocol):
    """A `Sampler`, or what else turns logits into tokens: a function of both arguments alone."""

    greedy: bool

    def __call__(self, logits: Floats, position: int) -> int:
        """The token at `position` = 0, 1, ... of the new text, from its logits [vocabulary]."""
        ...


@dataclass(frozen=True)
class Pass:
    """What to run next.

    Attributes:
        bits: its precision.
        rows: the last certain token, then guesses.
        level: what the guesses rest on (`Drafter.level`).
        guessing: seconds that guessing took.
    """

    bits: int
    rows: list[int]
    level: int = 0
    guessing: float = 0.0


class Steps:
    """One text.

    Attributes:
        tokens: certain, after the prompt.
        bits: precision of the pass behind each decode step so far.
        passes: forward passes after the prompt's, without guesses and probes.
        state: of the schedule.
    """

    def __init__(
        self, choose: Choose, scheduler: Scheduler, drafting: Drafting | None, most: int, ends: frozenset[int]
    ) -> None:
        """`most` tokens at the most, up to one of `ends`."""
        self.choose, self.scheduler, self.drafting = choose, scheduler, drafting
        self._most, self._ends = most, ends
        self._guard = scheduler if isinstance(scheduler, Guard) else None
        self.state = ScheduleState([])
        self.tokens: list[int] = []
        self.bits: list[int] = []
        self.passes = 0

    @property
    def guarded(self) -> dict[str, int] | None:
        """What the guard did; None without one."""
        return self._guard.report(self.state) if self._guard is not None else None

    @property
    def ended(self) -> bool:
        """Whether the text ends with an end token."""
        return bool(self.tokens) and self.tokens[-1] in self._ends

    @property
    def done(self) -> bool:
        """Whether the text is complete."""
        return len(self.tokens) >= self._most or self.ended

    @property
    def wants_logits(self) -> bool:
        """Whether `settle` needs logits; else the likeliest token of each row."""
        return not self.choose.greedy or self.scheduler.observes

    def begin(self, prompt_ids: Sequence[int], logits: Floats, features: Features) -> list[int]:
        """The first token, from the logits [vocabulary] after the prompt."""
        self.tokens = [self.choose(logits, 0)]
        self.state = self.scheduler.start(features, self._most)
        if self.drafting is not None:
            self.drafting.drafter.start(prompt_ids)
            self.drafting.drafter.update(self.tokens)
        return list(self.tokens)

    @property
    def next_bits(self) -> int:
        """Precision of the next pass."""
        return self.scheduler.bits(self.state, len(self.tokens) - 1)

    def plan(self, guess: bool = True) -> Pass:
        """The next pass, while not `done`; guesses only if `guess`. A drafter that runs the model finds it at `next_bits`."""
        bits, rows, drafting = self.next_bits, self.tokens[-1:], self.drafting
        if drafting is None or not guess:
            return Pass(bits, rows)
        step, level = len(self.tokens) - 1, drafting.drafter.level
        most = drafting.length(level, bits, self._most - len(self.tokens) - 1)
        if not most:
            return Pass(bits, rows, level)
        guesses, seconds = drafting.guess(self._reach(step, bits, most))
        # a right guess of an end is seen in the row before it
        rows += guesses[: next((at for at, token in enumerate(guesses) if token in self._ends), len(guesses))]
        return Pass(bits, rows, level, seconds)

    def settle(self, done: Pass, outputs: Any, seconds: float) -> list[int]:
        """The tokens that a pass made certain: one more than the guesses that were right.

        Args:
            outputs: logits float32 [rows, vocabulary] if `wants_logits`, else the likeliest token of each row.
            seconds: that the pass took; 0.0: not known.
        """
        guess = done.rows[1:]
        news = self._chosen(done, outputs) if self.wants_logits else outputs[: 1 + agreeing(guess, outputs)]
        self.tokens += news
        self.passes += 1
        self.bits += [done.bits] * len(news)
        if (drafting := self.drafting) is not None:
            if drafting.pace is not None and seconds:
                drafting.pace.passed(done.bits, len(done.rows), seconds)
            if done.level or guess:
                drafting.judge(done.level, done.bits, len(guess), news, done.guessing)
            drafting.drafter.update(news)
        return list(news)

    def _chosen(self, done: Pass, outputs: Floats) -> list[int]:
        step, news = len(self.tokens) - 1, list[int]()
        for at, logits in enumerate(outputs):
            if self.scheduler.observes:
                self.scheduler.observe(self.state, step + at, logits)
            news.append(self.choose(logits, step + at + 1))
            if done.rows[at + 1 : at + 2] != news[-1:] or not self._goes_on(step + at + 1, done.bits):
                break
        return news

    def _reach(self, step: int, bits: int, most: int) -> int:
        """How many steps after `step`, at most `most`, are sure to run at the same bits, without a probe between."""
        for ahead in range(1, most + 1):
            if not self._goes_on(step + ahead, bits):
                return ahead - 1
        return max(most, 0)

    def _goes_on(self, step: int, bits: int) -> bool:
        if self._guard is not None and self._guard.probe(self.state, step):
            return False
        return self.scheduler.bits(self.state, step) == bits


def agreeing(guess: Sequence[int], chosen: Sequence[int]) -> int:
    """How many of the first guesses are what was chosen."""
    return next(
        (at for at, (ours, theirs) in enumerate(zip(guess, chosen, strict=False)) if ours != theirs), len(guess)
    )
