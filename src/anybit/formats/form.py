"""Forms as plain data: how a weight is written, as config.json says it. Nothing here needs PyTorch."""

from __future__ import annotations

from typing import Any

Form = dict[str, Any]

MAX_BITS = 8
RATIO_ONE = 128
"""A nested weight's scales at other widths are ratios of its own, in 128ths (`formats/nested_affine.py`)."""


def row_bytes(columns: int) -> int:
    """Bytes of one plane row of `columns` codes."""
    return (columns + 7) // 8


def groups(columns: int, group_size: int) -> int:
    """Groups per row; the last one is shorter when `group_size` does not divide `columns`."""
    return -(-columns // group_size)


def precisions(form: Form) -> tuple[int, ...]:
    """Widths at which a layer of this form can be read, ascending: those of its nested code terms in common, or the one
    it stores; empty when no term holds codes."""
    codes = [set(part.get("precisions", (part["bits"],))) for part in form["terms"] if part["term"] == "code"]
    nested = [found for found in codes if len(found) > 1] or codes
    return tuple(sorted(set.intersection(*nested))) if nested else ()
