"""Falls when the model has become sure of itself (methods/pmpd.md 2.5): a baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from anybit.engine.schedule import Features, ScheduleState


@dataclass(frozen=True)
class ConfidenceSchedule:
    """At each precision, the first `window` steps set a bar; the first later step above it drops one precision.

    The bar is mean + `deviations` standard deviations of the largest probability. A text that starts very sure puts the bar
    above 1 and never falls: that is how the paper's baseline works.

    Attributes:
        precisions: the chain, falling.
    """

    precisions: tuple[int, ...]
    window: int = 10
    deviations: float = 1.0
    observes = True

    def start(self, features: Features, max_new_tokens: int) -> ScheduleState:
        """See `Scheduler`."""
        return ScheduleState([(0, self.precisions[0])], {"seen": []})

    def bits(self, state: ScheduleState, step: int) -> int:
        """See `Scheduler`."""
        return state.bits(step)

    def observe(self, state: ScheduleState, step: int, logits: Any) -> None:
        """See `Scheduler`: a switch counts from the next step on."""
        level = len(state.switches) - 1
        if level == len(self.precisions) - 1:
            return
        scores = np.asarray(logits, np.float64)
        surest = float(1 / np.exp(scores - scores.max()).sum())
        seen: list[float] = state.data["seen"]
        if len(seen) < self.window:
            seen.append(surest)
        elif surest >= np.mean(seen) + self.deviations * np.std(seen, ddof=1):
            state.switches.append((step + 1, self.precisions[level + 1]))
            state.data["seen"] = []
