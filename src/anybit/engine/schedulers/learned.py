"""Switch points chosen by a trained network that looks at the prompt (methods/pmpd.md 2.4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from anybit.engine.schedule import Features, ScheduleState
from anybit.engine.schedulers.classes import switches_of
from anybit.engine.schedulers.head import Head, mean_heads, softmax
from anybit.engine.schedulers.static import PARTS


@dataclass(frozen=True)
class LearnedSchedule:
    """One head per pair of neighbouring precisions; all decide once, right after the prompt.

    Attributes:
        precisions: the chain, falling.
        heads: one for each pair of neighbours.
        prefill: precision the prompt was read at in training, and has to be here.
        parts: of the grid; a head has parts + 1 classes.
    """

    precisions: tuple[int, ...]
    heads: tuple[Head, ...]
    prefill: int
    parts: int = PARTS
    observes = False

    def start(self, features: Features, max_new_tokens: int) -> ScheduleState:
        """See `Scheduler`. `data` keeps the classes and the probabilities they were chosen by."""
        keys, values = mean_heads(features)
        scores = [head.logits(keys, values) for head in self.heads]
        state = switches_of(self.precisions, [int(score.argmax()) for score in scores], max_new_tokens, self.parts)
        state.data["probabilities"] = [softmax(score) for score in scores]
        return state

    def bits(self, state: ScheduleState, step: int) -> int:
        """See `Scheduler`."""
        return state.bits(step)

    def observe(self, state: ScheduleState, step: int, logits: Any) -> None:
        """Decided already."""
