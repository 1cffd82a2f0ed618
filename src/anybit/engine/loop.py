"""The decode loop: passes over one token, or over guessed ones too, that emit exactly what one token at a time would.

A pass takes in the last certain token y and guesses d1..dk. What the model chooses after each is kept as long as the guess before
it was right, then the cache forgets the rest. A pass has one precision and never crosses a step where that changes, so the text
depends on the schedule alone, not on the guesses.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from anybit.engine.drafting.drafter import Drafter
from anybit.engine.drafting.pace import Pace
from anybit.engine.guard import Guard
from anybit.engine.sampler import Sampler
from anybit.engine.schedule import Scheduler, ScheduleState
from anybit.engine.stepper import Stepper


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


class Decoding:
    """One request.

    Attributes:
        steps: precision of the pass behind each decode step so far.
        passes: forward passes after the prompt's, without guesses and probes.
    """

    def __init__(self, runner: Stepper, sampler: Sampler, scheduler: Scheduler, drafting: Drafting | None) -> None:
        """`drafting` only where the rows of a pass equal single tokens: `runner.inexact` is empty."""
        self._runner, self._sampler, self._scheduler, self._drafting = runner, sampler, scheduler, drafting
        self._guard = scheduler if isinstance(scheduler, Guard) else None
        self._state = ScheduleState([])
        self.steps: list[int] = []
        self.passes = 0

    @property
    def guarded(self) -> dict[str, int] | None:
        """What the guard did; None without one."""
        return self._guard.report(self._state) if self._guard is not None else None

    def run(self, prompt_ids: list[int], prefill: int, most: int, ends: frozenset[int]) -> Iterator[list[int]]:
        """Runs of certain tokens, up to one of `ends` or `most` in all.

        Args:
            prompt_ids: at least one.
            prefill: bits for the prompt.
        """
        runner = self._runner
        runner.precision.bits = prefill
        tokens = [self._sampler(runner.prefill(prompt_ids), 0)]
        self._state = self._scheduler.start(runner, most)
        if self._drafting is not None:
            self._drafting.drafter.start(prompt_ids)
        yield list(tokens)
        news = tokens
        while len(tokens) < most and tokens[-1] not in ends:
            if self._drafting is not None:
                self._drafting.drafter.update(news)
            if self._guard is not None:
                self._probe(self._guard, tokens)
            news = self._advance(tokens[-1], len(tokens) - 1, most - len(tokens), ends)
            tokens += news
            yield news

    def _advance(self, token: int, step: int, room: int, ends: frozenset[int]) -> list[int]:
        """One pass from decode step `step` on, whose input is `token`; at most `room` new tokens."""
        runner, drafting = self._runner, self._drafting
        bits = runner.precision.bits = self._scheduler.bits(self._state, step)
        level, guess, guessing = 0, list[int](), 0.0
        if drafting is not None:
            level = drafting.drafter.level
            if most := drafting.length(level, bits, room - 1):
                guess, guessing = drafting.guess(self._reach(step, bits, most))
                # a right guess of an end is seen in the row before it
                guess = guess[: next((at for at, guessed in enumerate(guess) if guessed in ends), len(guess))]
        began, length = time.perf_counter(), runner.length
        news = self._choose([token, *guess], step, bits)
        if len(news) <= len(guess):
            runner.truncate(length + len(news))
        self.passes += 1
        self.steps += [bits] * len(news)
        if drafting is not None:
            if drafting.pace is not None:
                drafting.pace.passed(bits, 1 + len(guess), time.perf_counter() - began)
            if level:
                drafting.judge(level, bits, len(guess), news, guessing)
        return news

    def _reach(self, step: int, bits: int, most: int) -> int:
        """How many steps after `step`, at most `most`, are sure to run at the same bits, without a probe between."""
        for ahead in range(1, most + 1):
            if not self._goes_on(step + ahead, bits):
                return ahead - 1
        return max(most, 0)

    def _goes_on(self, step: int, bits: int) -> bool:
        if self._guard is not None and self._guard.probe(self._state, step):
            return False
        return self._scheduler.bits(self._state, step) == bits

    def _choose(self, rows: list[int], step: int, bits: int) -> list[int]:
        """The new tokens of a pass: one more than the guesses `rows[1:]` that were right."""
        if self._sampler.greedy and not self._scheduler.observes:
            chosen = self._runner.best(rows)
            return chosen[: 1 + agreeing(rows[1:], chosen)]
        news: list[int] = []
        for at, logits in enumerate(self._runner.verify(rows)):
            if self._scheduler.observes:
                self._scheduler.observe(self._state, step + at, logits)
            news.append(self._sampler(logits, step + at + 1))
            if rows[at + 1 : at + 2] != news[-1:] or not self._goes_on(step + at + 1, bits):
                break
        return news

    def _probe(self, guard: Guard, tokens: list[int]) -> None:
        """Read the last tokens again at the high precision, where the guard wants to."""
        step = len(tokens) - 1
        if not (count := guard.probe(self._state, step)):
            return
        self._runner.truncate(self._runner.length - count)
        self._runner.precision.bits = guard.high
        guard.judge(self._state, step, self._runner.verify(tokens[step - count : step]))


def agreeing(guess: Sequence[int], chosen: Sequence[int]) -> int:
    """How many of the first guesses are what was chosen."""
    return next(
        (at for at, (ours, theirs) in enumerate(zip(guess, chosen, strict=False)) if ours != theirs), len(guess)
    )
