"""Progress bars with the time left, on stderr, only where somebody is watching."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from anybit.calibration.progress import Progress, silent
from anybit.cli.output import console


@contextmanager
def progress_bars(out: Console | None = None) -> Iterator[Progress]:
    """A `Progress` callable that draws one bar per stage while the block runs; silent when stderr is not a terminal.

    Args:
        out: where to draw; None means stderr.
    """
    out = out or console()
    if not out.is_terminal:
        yield silent
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
    )
    with Bars(*columns, console=out) as bars:
        stages: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages[stage] = bars.add_task(stage, total=total)
            bars.update(stages[stage], completed=done, total=total)

        yield report
