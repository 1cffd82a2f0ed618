"""Which precision each step runs at: the contract between schedules (PMPD, methods/pmpd.md section 4) and the decode loop.

A *decode step* t = 0, 1, ... is the forward pass that takes the (t+1)-th new token in; the first new token itself comes from the
prompt's pass. A pass over several tokens at once (drafting) advances the clock by the tokens it emits and runs at one precision.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from anybit.errors import InputError


@dataclass
class ScheduleState:
    """What a schedule remembers of one request: plain data, never shared between requests.

    Attributes:
        switches: (first decode step, bits) ascending in steps; decided so far.
        data: whatever else a schedule needs; JSON.
    """

    switches: list[tuple[int, int]]
    data: dict[str, Any] = field(default_factory=dict)

    def bits(self, step: int) -> int:
        """The precision of decode step `step` >= 0."""
        return next(bits for first, bits in reversed(self.switches) if first <= step)


class Features(Protocol):
    """What the model knows after reading a prompt, for schedules that look at it."""

    def last_keys_values(self) -> tuple[Any, Any]:
        """Keys and values of the last layer as cached, each float32 [kv_heads, T, head_dim]."""
        ...


class Scheduler(Protocol):
    """Decides a request's precisions. `bits` is pure and cheap; only `start` may run a model.

    Attributes:
        precisions: every width it may ask for, descending.
        observes: whether it wants `observe` called; the loop then never runs ahead of it.
    """

    @property
    def precisions(self) -> tuple[int, ...]:
        """See above."""
        ...

    @property
    def observes(self) -> bool:
        """See above."""
        ...

    def start(self, features: Features, max_new_tokens: int) -> ScheduleState:
        """Called once, after the prompt was read and before decode step 0."""
        ...

    def bits(self, state: ScheduleState, step: int) -> int:
        """The precision of decode step `step`."""
        ...

    def observe(self, state: ScheduleState, step: int, logits: Any) -> None:
        """The logits float32 [vocabulary] that decode step `step` gave."""
        ...


@dataclass(frozen=True)
class FixedSchedule:
    """Switch points known before the request: `4@0,3@32,2@96`.

    Attributes:
        switches: (first decode step, bits), the first at step 0, ascending in steps.
    """

    switches: tuple[tuple[int, int], ...]
    observes = False

    @property
    def precisions(self) -> tuple[int, ...]:
        """See `Scheduler`."""
        return tuple(sorted({bits for _, bits in self.switches}, reverse=True))

    def start(self, features: Features, max_new_tokens: int) -> ScheduleState:
        """See `Scheduler`."""
        return ScheduleState(list(self.switches))

    def bits(self, state: ScheduleState, step: int) -> int:
        """See `Scheduler`."""
        return state.bits(step)

    def observe(self, state: ScheduleState, step: int, logits: Any) -> None:
        """Nothing to learn."""


def parse_schedule(text: str, *, may_rise: bool = False) -> FixedSchedule:
    """`4` or `4@0,3@32,2@96`: bits @ decode step; they rise only with `may_rise` (the guard).

    Raises:
        InputError: not of that form, steps that do not ascend from 0, bits outside 1..16, or bits that rise
            and may not.
    """
    switches: list[tuple[int, int]] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:@\s*(\d+)\s*)?", part)
        if not found or (found[2] is None and "," in text):
            raise InputError(f"--schedule {text}: write bits, or bits@step pairs such as 4@0,3@32,2@96")
        switches.append((int(found[2] or 0), int(found[1])))
    if switches[0][0] != 0 or any(b[0] <= a[0] for a, b in itertools.pairwise(switches)):
        raise InputError(f"--schedule {text}: steps must ascend from 0, such as 4@0,3@32")
    if any(not 1 <= bits <= 16 for _, bits in switches):
        raise InputError(f"--schedule {text}: bits must be 1 to 16")
    if not may_rise and any(b[1] > a[1] for a, b in itertools.pairwise(switches)):
        raise InputError(
            f"--schedule {text}: bits may only fall within a text; write the higher precision first, or add --guard"
        )
    return FixedSchedule(tuple(switches))


def check_available(scheduler: Scheduler, available: Sequence[int]) -> None:
    """Raise InputError when a schedule asks for a precision the checkpoint does not hold, or a single-precision
    checkpoint is asked to switch."""
    missing = [bits for bits in scheduler.precisions if bits not in available]
    if not missing:
        return
    if len(available) == 1:
        raise InputError(
            f"the schedule wants {missing[0]} bits, but this checkpoint is not nested: it holds {available[0]} bits only; "
            "quantize with a nested recipe (pmpd, any-precision, anybcq)"
        )
    raise InputError(f"the schedule wants {missing[0]} bits; this checkpoint holds {sorted(available)}")


@dataclass(frozen=True)
class BitsAccount:
    """The bits of a request's decode passes, in order of tokens.

    Attributes:
        steps: precision of the pass behind each decode step, [emitted tokens - 1 at least].
    """

    steps: tuple[int, ...]

    @property
    def average(self) -> float:
        """Honest: every decode step counts."""
        return sum(self.steps) / len(self.steps) if self.steps else 0.0

    @property
    def average_paper(self) -> float:
        """As the paper counts: decode step 0 is not in its log (methods/pmpd.md 2.2 b)."""
        logged = self.steps[1:]
        return sum(logged) / len(logged) if logged else self.average

    @property
    def histogram(self) -> dict[int, int]:
        """Steps at each precision."""
        return {bits: self.steps.count(bits) for bits in sorted(set(self.steps), reverse=True)}
