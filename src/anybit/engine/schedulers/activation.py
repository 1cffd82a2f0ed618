"""Switch points from the mean of the last hidden state (methods/pmpd.md 2.5, activation (a)): a baseline of the learned one.

Only the torch engine hands hidden states out; with the native one this scheduler refuses to start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from anybit.engine.schedule import Features, ScheduleState
from anybit.engine.schedulers.classes import switches_of
from anybit.engine.schedulers.head import Array, mlp
from anybit.engine.schedulers.static import PARTS
from anybit.errors import InputError


@dataclass(frozen=True)
class ActivationSchedule:
    """One perceptron E -> (E + 4) / 2 -> classes per pair of neighbouring precisions.

    Attributes:
        precisions: the chain, falling.
        heads: tensors of each: `hidden.weight` [(E + 4) / 2, E], `hidden.bias`, `out.weight`, `out.bias`.
        prefill: precision the prompt was read at in training.
    """

    precisions: tuple[int, ...]
    heads: tuple[Mapping[str, Array], ...]
    prefill: int
    parts: int = PARTS
    observes = False

    def start(self, features: Features, max_new_tokens: int) -> ScheduleState:
        """See `Scheduler`.

        Raises:
            InputError: an engine that does not hand out `last_hidden()`, [T, E].
        """
        hidden = getattr(features, "last_hidden", None)
        if hidden is None:
            raise InputError(
                "the activation schedule needs hidden states, which only the torch engine gives; use --engine torch"
            )
        mean = np.asarray(hidden(), np.float32).mean(axis=0)
        classes = [int(mlp(head, mean).argmax()) for head in self.heads]
        return switches_of(self.precisions, classes, max_new_tokens, self.parts)

    def bits(self, state: ScheduleState, step: int) -> int:
        """See `Scheduler`."""
        return state.bits(step)

    def observe(self, state: ScheduleState, step: int, logits: Any) -> None:
        """Decided already."""
