"""Reading a checkpoint's ledger.json: pure JSON, no tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from anybit.cli.options import check_directory
from anybit.errors import InputError
from anybit.report.grid import place

ROW_KEYS: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "planned": str,
    "actual": str,
    "shape": list,
    "bits": int,
    "bits_per_weight": (int, float),
    "stored_bytes": int,
    "error": (int, float),
    "kernel": str,
}
"""What every row must say, and its JSON type; the other keys are shown when present."""


def read_ledger(directory: Path) -> dict[str, Any]:
    """The ledger of a checkpoint, checked for the keys that commands rely on.

    Raises:
        InputError: not a checkpoint, or the ledger is not readable, not JSON or incomplete.
    """
    path = check_directory(directory) / "ledger.json"
    again = "quantize again, or copy the whole directory again"
    try:
        ledger = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: unreadable ledger ({error}); {again}") from error
    if not isinstance(ledger, dict) or not isinstance(ledger.get("tensors"), list):
        raise InputError(f"{path}: not a ledger (no 'tensors' list); {again}")
    if not isinstance(ledger.get("bits_per_weight"), int | float):
        raise InputError(f"{path}: 'bits_per_weight' is missing or no number; {again}")
    for at, row in enumerate(ledger["tensors"]):
        wrong = [
            key for key, kind in ROW_KEYS.items() if not isinstance(row, dict) or not isinstance(row.get(key), kind)
        ]
        if wrong:
            raise InputError(f"{path}: tensor {at} has no valid {', '.join(wrong)}; {again}")
    return ledger


def in_blocks(ledger: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows whose bits are "the precision" of a model: those inside its blocks, not embedding and head."""
    rows = ledger["tensors"]
    return [row for row in rows if place(row["name"])[0] is not None] or rows


def nested_precisions(ledger: dict[str, Any]) -> list[int]:
    """Widths that all nested tensors can be read at, ascending; none where nothing is nested."""
    nested = [set(found) for row in ledger["tensors"] if len(found := row.get("precisions", [])) > 1]
    return sorted(set.intersection(*nested)) if nested else []


def stored_precisions(ledger: dict[str, Any]) -> list[str]:
    """What `--precision` and `--schedule` can be: `stored`, and the widths of a nested model, or else the number of bits if
    all blocks share it."""
    bits = nested_precisions(ledger) or sorted({row["bits"] for row in in_blocks(ledger)})
    return ["stored", *(str(b) for b in bits if len(bits) == 1 or nested_precisions(ledger))]


def chosen_precision(ledger: dict[str, Any], flag: str, text: str | None) -> int | None:
    """The width to load a model with; None for what is stored.

    Raises:
        InputError: not a precision of this checkpoint.
    """
    known = stored_precisions(ledger)
    if text is not None and text not in known:
        raise InputError(f"{flag} {text}: not in this checkpoint; it can run at {', '.join(known)}")
    return int(text) if text is not None and nested_precisions(ledger) and text != "stored" else None


def mean_code_bits(ledger: dict[str, Any]) -> float:
    """Code bits per weight of the blocks, averaged over weights: the precision in use, without scales and tables."""
    rows = in_blocks(ledger)
    sizes = [row["shape"][0] * row["shape"][1] for row in rows]
    return sum(n * row["bits"] for n, row in zip(sizes, rows, strict=True)) / max(sum(sizes), 1)
