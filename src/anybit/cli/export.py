"""`anybit export`: a checkpoint in another engine's format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from anybit.cli.options import AllowLoss, Directory, Json, Overwrite, check_directory
from anybit.cli.output import print_json, say, say_facts
from anybit.cli.progress import progress_bars
from anybit.report.words import size


def export(
    directory: Directory,
    to: Annotated[str, typer.Option(metavar="FORMAT", help="compressed-tensors, gptq, awq, gguf or onnx")],
    out: Annotated[Path, typer.Option(metavar="PATH", help="What to write: a directory, for gguf a file")],
    precision: Annotated[
        int | None, typer.Option(metavar="BITS", help="Width of a nested checkpoint to write; all of it unless said")
    ] = None,
    allow_loss: AllowLoss = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write a checkpoint in another engine's format.

    Codes and scales carry over exactly; what the format cannot say is refused with the reason (docs/exporting.md).
    """
    import anybit

    check_directory(directory)
    with progress_bars() as progress:
        result = anybit.export(
            directory,
            to=to,
            out=out,
            precision=precision,
            allow_loss=allow_loss,
            overwrite=overwrite,
            progress=progress,
        )
    if json:
        print_json(result)
    else:
        show(result)


def show(result: dict[str, Any]) -> None:
    """Print what `anybit.export` or `anybit.import_checkpoint` returned."""
    exact = "yes, codes and scales are the same numbers" if result["lossless"] else "no, see below"
    facts = {
        "format": result["format"],
        "written": result["path"],
        "size": size(result["size_bytes"]),
        "lossless": exact,
    }
    say_facts(facts)
    say(*(f"- {note}" for note in result["notes"]))
