"""A ledger as a grid: kinds of linears down, blocks across."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
"""One tensor of a ledger."""


def place(name: str) -> tuple[int | None, str]:
    """Block number and kind of a tensor: `model.layers.3.mlp.up_proj` is (3, "mlp.up_proj"); no block gives None.

    Later numbers (experts) become `*`, so that one row of a picture is one kind of linear.
    """
    found = re.match(r"(?:.*?\.)?(\d+)\.(.+)$", name)
    if not found:
        return None, name
    return int(found[1]), re.sub(r"(?<=\.)\d+(?=\.|$)", "*", found[2])


def kinds_and_blocks(rows: Sequence[Row]) -> tuple[list[str], list[int]]:
    """The kinds in order of appearance and the sorted block numbers of all tensors that are in a block."""
    places = [place(row["name"]) for row in rows]
    kinds = dict.fromkeys(kind for block, kind in places if block is not None)
    return list(kinds), sorted({block for block, _ in places if block is not None})


def grid(rows: Sequence[Row], key: str) -> list[list[float | None]]:
    """Mean of `key` for each kind (rows) and block (columns); None where there is no such tensor or value."""
    kinds, blocks = kinds_and_blocks(rows)
    cells: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        block, kind = place(row["name"])
        if block is not None and row.get(key) is not None:
            cells.setdefault((kind, block), []).append(row[key])
    means = {at: sum(values) / len(values) for at, values in cells.items()}
    return [[means.get((kind, block)) for block in blocks] for kind in kinds]
