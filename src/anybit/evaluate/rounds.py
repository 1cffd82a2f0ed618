"""Fair timing on a machine that others use too: everybody takes turns, and only ratios within a turn are compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeVar

T = TypeVar("T")
BUSY_CORES = 0.3
"""Cores' worth of other work beyond which a measurement deserves a warning."""


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of `n` values."""

    median: float
    low: float
    high: float
    n: int


def spread(values: Sequence[float]) -> Spread:
    """The spread of at least one value."""
    return Spread(median(values), min(values), max(values), len(values))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """The spread of ours / theirs, round by round: what slows a whole round down cancels."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def take_turns(
    measures: Mapping[str, Callable[[], T]],
    rounds: int,
    failed: Callable[[str, Exception], None],
    gives_up: type[Exception],
) -> dict[str, list[T]]:
    """Call every function once per round, in an order that rotates, so that nobody always follows the same neighbour.

    Args:
        measures: by name.
        rounds: at least 1.
        failed: told about one that raises `gives_up`; it takes no part any more and its results are dropped.
        gives_up: other exceptions pass through.

    Returns:
        `rounds` results of each that never failed.
    """
    results: dict[str, list[T]] = {name: [] for name in measures}
    for turn in range(rounds):
        names = list(results)
        start = turn % len(names) if names else 0
        for name in names[start:] + names[:start]:
            try:
                results[name].append(measures[name]())
            except gives_up as error:
                failed(name, error)
                del results[name]
    return results


def busy_cores(seconds: float = 0.5) -> float | None:
    """Cores' worth of work that everybody did during a sleep of ours; None where the system does not tell.

    Time stolen from a virtual machine counts as busy.
    """
    before = _processor_time()
    time.sleep(seconds)
    after = _processor_time()
    if before is None or after is None or after[1] <= before[1]:
        return None
    total, cores = after[1] - before[1], after[2]
    return max(0.0, 1 - (after[0] - before[0]) / total) * cores


def _processor_time() -> tuple[int, int, int] | None:
    """Idle and total ticks of all cores, and their number, out of /proc/stat."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return None
    lines = stat.read_text().splitlines()
    ticks = [int(word) for word in lines[0].split()[1:9]]  # guest time, behind these, is part of user time already
    return ticks[3] + ticks[4], sum(ticks), sum(line.startswith("cpu") for line in lines) - 1
