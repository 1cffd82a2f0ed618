"""`anybit inspect`: the ledger of a checkpoint as a table, as JSON or as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from anybit.cli.ledger import nested_precisions, read_ledger
from anybit.cli.options import Directory, Json
from anybit.cli.output import print_json, say, say_table
from anybit.report.words import size

COLUMNS = ("name", "form", "bits", "bits/weight", "error", "tokens", "kernel")


def inspect(
    directory: Directory,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw it, as one offline HTML page")] = None,
    json: Json = False,
) -> None:
    """Show the ledger: form, bits, error and kernel of each tensor."""
    ledger = read_ledger(directory)
    ledger = ledger | {"tensors": [row | {"form": row.get("form", row["actual"])} for row in ledger["tensors"]]}
    if html is not None:
        from anybit.report.page import write_report

        write_report({"title": f"Ledger of {directory.name}", "ledger": ledger}, html)
        say(f"wrote {html}")
    if json:
        print_json(ledger)
    else:
        show(ledger)


def show(ledger: dict[str, Any]) -> None:
    """Print a ledger for a person."""
    rows = ledger["tensors"]
    say_table(COLUMNS, map(_cells, rows), right=("bits", "bits/weight", "error", "tokens"))
    whole = f"  {size(ledger['size_bytes'])}" if "size_bytes" in ledger else ""
    say(f"{len(rows)} tensors, {ledger['bits_per_weight']:.3f} bits per weight{whole}")
    if widths := nested_precisions(ledger):
        say(f"nested: can be read at {', '.join(map(str, widths))} bits")
    for row in rows:
        if row["planned"] not in (row["actual"], "imported"):
            say(f"{row['name']}: planned {row['planned']}, stored {row['actual']}")
        for note in row.get("notes", []):
            say(f"{row['name']}: {note}")


def _cells(row: dict[str, Any]) -> tuple[object, ...]:
    numbers = (row["bits"], f"{row['bits_per_weight']:.3f}", f"{row['error']:.4f}", row.get("calibration_tokens"))
    return row["name"], row["form"], *numbers, row["kernel"]
