"""A quality guard around a schedule (beyond the paper): switch back up when low precision is not trusted any more.

Two signs, both functions of the text alone, so a run can be repeated: the model's own confidence, which costs next to nothing,
and a probe, which reads the last tokens again at the high precision and compares what both would have said.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anybit.engine.schedule import Features, Scheduler, ScheduleState


@dataclass
class GuardedState(ScheduleState):
    """See `ScheduleState`; `switches` stays empty.

    Attributes:
        inner: what the guarded schedule remembers.
        until: first decode step that is not raised any more.
        hold: decode steps that the next raise will last.
        clear: first decode step whose signs count; a raise begins a new observation.
        sure: probabilities of the likeliest token, of the last low steps.
        said: likeliest tokens of the last low steps.
        probes, raised: how often each happened.
    """

    inner: ScheduleState = field(default_factory=lambda: ScheduleState([]))
    until: int = 0
    hold: int = 0
    clear: int = 0
    sure: list[float] = field(default_factory=list)
    said: list[int] = field(default_factory=list)
    probes: int = 0
    raised: int = 0


@dataclass(frozen=True)
class Guard:
    """A `Scheduler` that follows another one and raises the precision to `high` for a while when a sign says so.

    Attributes:
        inner: the schedule to follow.
        high: precision of raised steps and of probes.
        window: low steps looked at together.
        sure: mean probability of the likeliest token over a window below which the precision is raised.
        period: low steps between two probes, at least `window`.
        agree: share of a window's tokens that both precisions must say alike.
        hold: steps that the first raise lasts; every further raise lasts twice as long.
    """

    inner: Scheduler
    high: int
    window: int = 8
    sure: float = 0.2
    period: int = 32
    agree: float = 0.5
    hold: int = 32
    observes = True

    @property
    def precisions(self) -> tuple[int, ...]:
        """See `Scheduler`."""
        return tuple(sorted({self.high, *self.inner.precisions}, reverse=True))

    def start(self, features: Features, max_new_tokens: int) -> GuardedState:
        """See `Scheduler`."""
        return GuardedState([], inner=self.inner.start(features, max_new_tokens), hold=self.hold)

    def bits(self, state: ScheduleState, step: int) -> int:
        """See `Scheduler`."""
        assert isinstance(state, GuardedState)
        bits = self.inner.bits(state.inner, step)
        return max(bits, self.high) if step < state.until else bits

    def observe(self, state: ScheduleState, step: int, logits: NDArray[Any]) -> None:
        """See `Scheduler`."""
        assert isinstance(state, GuardedState)
        low = self.bits(state, step) < self.high
        if self.inner.observes:
            self.inner.observe(state.inner, step, logits)
        if not low:
            state.clear, state.sure, state.said = step + 1, [], []
            return
        best = int(logits.argmax())
        weights = np.exp(logits - logits[best], dtype=np.float32)
        state.sure = [*state.sure, 1.0 / float(weights.sum())][-self.window :]
        state.said = [*state.said, best][-self.window :]
        if len(state.sure) == self.window and sum(state.sure) < self.sure * self.window:
            self._raise(state, step + 1)

    def probe(self, state: ScheduleState, step: int) -> int:
        """How many tokens to read again at `high` before decode step `step`; 0: none.

        Those are the inputs of the steps just done, so the cache keeps what the high precision writes.
        """
        assert isinstance(state, GuardedState)
        low = step - state.clear
        return self.window if low and low % self.period == 0 and len(state.said) == self.window else 0

    def judge(self, state: ScheduleState, step: int, logits: NDArray[Any]) -> None:
        """What a probe before decode step `step` gave: logits [window, vocabulary]."""
        assert isinstance(state, GuardedState)
        state.probes += 1
        agreed = sum(int(row.argmax()) == said for row, said in zip(logits, state.said, strict=True))
        if agreed < self.agree * self.window:
            self._raise(state, step)

    def _raise(self, state: GuardedState, step: int) -> None:
        state.raised += 1
        state.until, state.hold = step + state.hold, 2 * state.hold
        state.clear, state.sure, state.said = state.until, [], []

    def report(self, state: ScheduleState) -> dict[str, int]:
        """`{probes, raised}` of a request."""
        assert isinstance(state, GuardedState)
        return {"probes": state.probes, "raised": state.raised}
