"""What passes cost, by the rows they have: measured while texts are made, kept with the model."""

from __future__ import annotations

from collections import deque

_SLOPE = 0.15  # of a pass for each further row, until rows have been timed
_REMEMBERED = 9  # times of one kind of pass, whose least counts: what else a machine does only adds to them


class PassTimes:
    """How long passes took, by precision and rows: a request begins with what those before it saw."""

    def __init__(self) -> None:
        self._times: dict[int, dict[int, deque[float]]] = {}
        self._least: dict[int, dict[int, float]] = {}
        self._seconds: dict[tuple[int, int], float] = {}  # answers, until something changes

    def passed(self, bits: int, rows: int, seconds: float) -> None:
        """A pass over `rows` tokens took this long."""
        times = self._times.setdefault(bits, {}).setdefault(rows, deque(maxlen=_REMEMBERED))
        times.append(seconds)
        least, known = min(times), self._least.setdefault(bits, {})
        if known.get(rows) != least:
            known[rows] = least
            self._seconds.clear()

    def seconds(self, bits: int, rows: int) -> float:
        """Least time of a pass over so many rows or more, or what fewer rows let expect; 0.0 until one row has been timed."""
        known = self._seconds.get((bits, rows))
        if known is None:
            known = self._seconds[bits, rows] = self._estimate(self._least.get(bits, {}), rows)
        return known

    def _estimate(self, least: dict[int, float], rows: int) -> float:
        if 1 not in least:
            return 0.0
        above = min((seconds for timed, seconds in least.items() if timed >= rows), default=float("inf"))
        if rows in least:
            return above
        below = max(timed for timed in least if timed < rows)
        return min(above, least[below] * (1 + _SLOPE * (rows - 1)) / (1 + _SLOPE * (below - 1)))
