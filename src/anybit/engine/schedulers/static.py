"""Switch points that are the same for every prompt of a task (methods/pmpd.md 2.3).

A switch point is a number of decode steps at the higher precision: 0 never uses it, L never leaves it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from anybit.engine.schedule import FixedSchedule
from anybit.errors import InputError

PARTS = 3
"""Parts that the paper's grid cuts a text into."""


def grid(length: int, parts: int = PARTS) -> tuple[int, ...]:
    """Switch points 0, L/N, ..., L, rounded down."""
    if length < 1 or parts < 1:
        raise InputError(f"a grid needs a length and a number of parts of at least 1, not {length} and {parts}")
    return tuple(i * length // parts for i in range(parts + 1))


def chain_of(precisions: Sequence[int]) -> tuple[int, ...]:
    """Precisions in the order they are used: falling, each once; gaps such as 8, 4, 2 are fine.

    Raises:
        InputError: none, or the same one twice.
    """
    chain = tuple(sorted(set(precisions), reverse=True))
    if not chain or len(chain) != len(precisions):
        raise InputError(f"a chain of precisions has each one once, not {list(precisions)}")
    return chain


def static(chain: Sequence[int], points: Sequence[int]) -> FixedSchedule:
    """Switch from chain[i] to chain[i + 1] at decode step points[i]; of several switches at one step the last counts.

    Raises:
        InputError: not one point for each pair of neighbours, or points that fall.
    """
    if len(points) != len(chain) - 1 or any(b < a for a, b in itertools.pairwise(points)) or min(points, default=0) < 0:
        raise InputError(f"the chain {list(chain)} needs {len(chain) - 1} switch points that do not fall, not {points}")
    switches = {0: chain[0]} | dict(zip(points, chain[1:], strict=True))  # a later switch replaces one at the same step
    return FixedSchedule(tuple(sorted(switches.items())))


def candidates(chain: Sequence[int], length: int, parts: int = PARTS) -> list[FixedSchedule]:
    """Every schedule whose switch points lie on the grid, without the doubles, most bits first.

    Args:
        chain: precisions, falling.
        length: most new tokens L; a point at L means that the switch never happens.
    """
    found: dict[FixedSchedule, None] = {}
    for points in itertools.combinations_with_replacement(grid(length, parts), len(chain) - 1):
        reached = [point for point in points if point < length]
        found[static(chain[: len(reached) + 1], reached)] = None
    return sorted(found, key=lambda schedule: -mean_bits(schedule, length))


def mean_bits(schedule: FixedSchedule, steps: int) -> float:
    """Average precision of the first `steps` decode steps."""
    state = schedule.start(None, steps)  # type: ignore[arg-type]  # a fixed schedule looks at nothing
    return sum(state.bits(step) for step in range(steps)) / steps
