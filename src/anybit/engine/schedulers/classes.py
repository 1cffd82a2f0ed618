"""From one class per pair of neighbouring precisions to the switch points of a text."""

from __future__ import annotations

from collections.abc import Sequence

from anybit.engine.schedule import ScheduleState
from anybit.engine.schedulers.static import static


def switches_of(chain: Sequence[int], classes: Sequence[int], length: int, parts: int) -> ScheduleState:
    """Class c of a pair: its higher precision runs for c * L // N steps, class N: to the end.

    Every pair counts from the switch before it, so a chain of three does not fall twice in a row just because the second
    pair's count ran out during the first (methods/pmpd.md 6.2).

    Args:
        chain: precisions, falling.
        classes: one for each pair of neighbours, 0..parts.
        length: most new tokens L.
    """
    points: list[int] = []
    for choice in classes:
        if choice >= parts:
            break
        points.append((points[-1] if points else 0) + choice * length // parts)
    fixed = static(chain[: len(points) + 1], points)
    return ScheduleState(list(fixed.switches), {"classes": list(classes)})
