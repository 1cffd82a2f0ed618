"""Greedy texts in the lanes of a model, decoded in step, with a way back: what every measurement of a schedule runs on.

The same tokens as `engine.generate` gives one by one: the rows of a pass do not change each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from anybit.engine.lanes import LaneFeatures, Lanes
from anybit.engine.schedule import FixedSchedule, Scheduler, ScheduleState
from anybit.errors import InputError


@dataclass(frozen=True)
class Mark:
    """A place to come back to: tokens of each text, and the step."""

    tokens: tuple[int, ...]
    step: int


class Batch:
    """Prompts, at most as many as there are lanes, and their texts so far.

    Attributes:
        texts: new tokens of each prompt, with the end token when that ended it.
        step: decode steps taken.
    """

    def __init__(self, lanes: Lanes, prompts: Sequence[Sequence[int]], prefill: int, limit: int) -> None:
        """Read the prompts at `prefill` bits; texts have at most `limit` tokens."""
        if len(prompts) > lanes.count:
            raise InputError(f"{len(prompts)} prompts do not fit {lanes.count} lanes")
        if lanes.context is not None and max(map(len, prompts)) + limit > lanes.context:
            raise InputError(
                f"a prompt of {max(map(len, prompts))} tokens and {limit} new ones exceed the model's context"
            )
        self._lanes, self._limit = lanes, limit
        self._prompts = [len(prompt) for prompt in prompts]
        self.texts = [[int(np.argmax(lanes.read(lane, prompt, prefill)))] for lane, prompt in enumerate(prompts)]
        self.step = 0

    def advance(self, until: int, bits: int) -> None:
        """Decode steps up to `until` (not with it) at one precision; texts that ended stay."""
        until = min(until, self._limit - 1)
        while self.step < until:
            going = {lane: text[-1] for lane, text in enumerate(self.texts) if not self.ended(lane)}
            if going:
                logits = self._lanes.step(going, bits)
                for lane, row in zip(going, logits, strict=True):
                    self.texts[lane].append(int(np.argmax(row)))
            self.step += 1

    def ended(self, lane: int) -> bool:
        """Whether a text is complete."""
        return self.texts[lane][-1] in self._lanes.end_ids or len(self.texts[lane]) >= self._limit

    def mark(self) -> Mark:
        """Where the texts are now."""
        return Mark(tuple(len(text) for text in self.texts), self.step)

    def rewind(self, mark: Mark) -> None:
        """Go back: the cache is as it was at the mark, bit for bit."""
        for lane, tokens in enumerate(mark.tokens):
            del self.texts[lane][tokens:]
            self._lanes.keep(lane, self._prompts[lane] + tokens - 1)  # the last token was not run yet
        self.step = mark.step


def run_fixed(
    lanes: Lanes, prompts: Sequence[Sequence[int]], schedule: FixedSchedule, prefill: int, limit: int
) -> list[list[int]]:
    """Texts of at most as many prompts as lanes under switch points that all share."""
    batch = Batch(lanes, prompts, prefill, limit)
    ends = [first for first, _ in schedule.switches[1:]] + [limit]
    for (_, bits), end in zip(schedule.switches, ends, strict=True):
        batch.advance(end, bits)
    return batch.texts


def run_scheduled(
    lanes: Lanes, prompt: Sequence[int], scheduler: Scheduler, prefill: int, limit: int
) -> tuple[list[int], ScheduleState]:
    """One text under a schedule that looks at the prompt or at the logits, and what the schedule did."""
    text = [int(np.argmax(lanes.read(0, prompt, prefill)))]
    state = scheduler.start(LaneFeatures(lanes, 0), limit)
    for step in range(limit - 1):
        if text[-1] in lanes.end_ids:
            break
        logits = lanes.step({0: text[-1]}, scheduler.bits(state, step))[0]
        if scheduler.observes:
            scheduler.observe(state, step, logits)
        text.append(int(np.argmax(logits)))
    return text, state


def chunks(prompts: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Indices of prompts in groups of alike length, at most `size` each."""
    order = sorted(range(len(prompts)), key=lambda at: len(prompts[at]))
    return (order[start : start + size] for start in range(0, len(order), size))


def bits_of(text: Sequence[int], state: ScheduleState) -> tuple[int, ...]:
    """The precision of every decode step behind a text: its first token came from the prompt's pass."""
    return tuple(state.bits(step) for step in range(len(text) - 1))
