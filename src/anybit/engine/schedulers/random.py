"""Switch points drawn by lot (methods/pmpd.md 2.5): what a learned schedule has to beat."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anybit.engine.schedule import Features, ScheduleState
from anybit.engine.schedulers.classes import switches_of
from anybit.engine.schedulers.static import PARTS


@dataclass(frozen=True)
class RandomSchedule:
    """One draw per pair and text. The draw depends on the seed and the prompt alone, not on what ran before.

    Attributes:
        precisions: the chain, falling.
        prior: weight of each class 0..parts for each pair; None: all equal.
        seed: of the draws.
    """

    precisions: tuple[int, ...]
    prior: tuple[tuple[float, ...], ...] | None = None
    seed: int = 0
    parts: int = PARTS
    observes = False

    def start(self, features: Features, max_new_tokens: int) -> ScheduleState:
        """See `Scheduler`."""
        keys, _ = features.last_keys_values()
        prompt = zlib.crc32(np.ascontiguousarray(keys, np.float32).tobytes())
        draw = np.random.default_rng([self.seed, prompt])
        classes = [_draw(draw, weights) for weights in self.weights()]
        return switches_of(self.precisions, classes, max_new_tokens, self.parts)

    def weights(self) -> Sequence[Sequence[float]]:
        """The prior of each pair."""
        return self.prior or [[1.0] * (self.parts + 1)] * (len(self.precisions) - 1)

    def bits(self, state: ScheduleState, step: int) -> int:
        """See `Scheduler`."""
        return state.bits(step)

    def observe(self, state: ScheduleState, step: int, logits: Any) -> None:
        """Decided already."""


def _draw(draw: np.random.Generator, weights: Sequence[float]) -> int:
    share = np.asarray(weights, np.float64)
    return int(draw.choice(len(share), p=share / share.sum()))
