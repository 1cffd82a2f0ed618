"""`anybit import`: another engine's checkpoint as one of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anybit.cli.export import show
from anybit.cli.options import AllowLoss, Json, Overwrite
from anybit.cli.output import print_json, say
from anybit.cli.progress import progress_bars


def import_(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="GPTQ, AWQ or compressed-tensors directory, or a .gguf file")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory to write; refused when it holds something")],
    allow_loss: AllowLoss = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Take another engine's checkpoint over, code by code.

    Nothing is quantized again: codes and scales stay the numbers they are, and gain anybit's kernels and evaluation.
    """
    import anybit

    with progress_bars() as progress:
        result = anybit.import_checkpoint(path, out=out, allow_loss=allow_loss, overwrite=overwrite, progress=progress)
    if json:
        print_json(result)
    else:
        show(result)
        say(f"next: anybit inspect {out}   or   anybit eval {out} --text FILE")
