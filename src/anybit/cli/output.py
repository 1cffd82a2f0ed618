"""What a command prints: machines read stdout, people read stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

FILE_WIDTH = 400
"""Columns of tables that nobody watches; only as many as needed are used."""


def console() -> Console:
    """The console for people: stderr, so that stdout stays clean for data. Made when asked, so redirection is seen.

    Nothing is wrapped in a file or a pipe: there a line is what one searches for.
    """
    out = Console(stderr=True, highlight=False, markup=False)
    return out if out.is_terminal else Console(stderr=True, highlight=False, markup=False, width=FILE_WIDTH)


def print_json(data: Mapping[str, Any] | Sequence[Any]) -> None:
    """Print `data` on stdout as one line of strict JSON (NaN and infinity have no JSON form and become null)."""
    sys.stdout.write(json.dumps(plain(data), ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def plain(value: Any) -> Any:
    """`value` with every path as a string, every tuple as a list and every non-finite number as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def say(*lines: str) -> None:
    """Print lines for a person; `[brackets]` and emoji codes in them are left as they are."""
    out = console()
    for line in lines:
        out.print(line, soft_wrap=True, emoji=False)


def say_facts(facts: Mapping[str, object]) -> None:
    """Print `name  value` lines, names aligned; facts that are None are left out."""
    known = {name: value for name, value in facts.items() if value is not None}
    width = max(map(len, known), default=0)
    say(*(f"{name:<{width}}  {value}" for name, value in known.items()))


def say_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[str] = ()) -> None:
    """Print a table for a person.

    Args:
        columns: headings, one per cell of a row.
        rows: cells, shown with `str`; None becomes a dash.
        right: the headings whose cells are numbers and align right.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    numbers = set(right)
    for column in columns:
        # A name is only useful whole, so it wraps instead of being cut.
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text("-" if cell is None else str(cell)) for cell in row))
    console().print(table)
