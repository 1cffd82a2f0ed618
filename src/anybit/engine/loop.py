"""The decode loop for one text: its passes, one after the other."""

from __future__ import annotations

import time
from collections.abc import Iterator

from anybit.engine.guard import Guard
from anybit.engine.schedule import Scheduler
from anybit.engine.stepper import Stepper
from anybit.engine.steps import Choose, Drafting, Steps


class Decoding:
    """One request.

    Attributes:
        steps: its text.
    """

    def __init__(
        self,
        runner: Stepper,
        choose: Choose,
        scheduler: Scheduler,
        drafting: Drafting | None,
        most: int,
        ends: frozenset[int],
    ) -> None:
        """`drafting` only where the rows of a pass equal single tokens: `runner.inexact` is empty."""
        self._runner = runner
        self._guard = scheduler if isinstance(scheduler, Guard) else None
        self.steps = Steps(choose, scheduler, drafting, most, ends)

    def run(self, prompt_ids: list[int], prefill: int) -> Iterator[list[int]]:
        """Runs of certain tokens.

        Args:
            prompt_ids: at least one.
            prefill: bits for the prompt.
        """
        runner, steps = self._runner, self.steps
        runner.precision.bits = prefill
        yield steps.begin(prompt_ids, runner.prefill(prompt_ids), runner)
        while not steps.done:
            if self._guard is not None:
                self._probe(self._guard)
            yield self._advance()

    def _advance(self) -> list[int]:
        runner, steps = self._runner, self.steps
        runner.precision.bits = steps.next_bits
        planned = steps.plan()
        began, length = time.perf_counter(), runner.length
        outputs = runner.verify(planned.rows) if steps.wants_logits else runner.best(planned.rows)
        seconds = time.perf_counter() - began
        news = steps.settle(planned, outputs, seconds)
        if len(news) < len(planned.rows):
            runner.truncate(length + len(news))
        return news

    def _probe(self, guard: Guard) -> None:
        """Read the last tokens again at the high precision, where the guard wants to."""
        steps, step = self.steps, len(self.steps.tokens) - 1
        if not (count := guard.probe(steps.state, step)):
            return
        self._runner.truncate(self._runner.length - count)
        self._runner.precision.bits = guard.high
        guard.judge(steps.state, step, self._runner.verify(steps.tokens[step - count : step]))
