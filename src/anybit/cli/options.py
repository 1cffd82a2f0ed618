"""Arguments and flags that several commands share, and the checks on their values."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from anybit.errors import InputError

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Hugging Face directory, anybit directory, .gguf file, hub id, or `demo` (the model that comes along)",
    ),
]
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="Directory written by `anybit quantize`")]
Recipe = Annotated[str, typer.Option(metavar="NAME_OR_YAML", help="Recipe name (see `anybit recipes`) or YAML file")]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="STAGE.OPTION=VALUE", help="Change one option of the recipe; repeatable"),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output directory")]
AllowLoss = Annotated[
    bool,
    typer.Option("--allow-loss", help="Write the nearest where a layer cannot be said exactly, and list every loss"),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped")]
Seed = Annotated[int, typer.Option(metavar="S", min=0, help="Seed of everything random")]

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)}
_UNITS |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", start=1)}


def parse_size(text: str, flag: str) -> int:
    """Bytes in a size such as `8GiB`, `90MB` or `1500000`.

    Raises:
        InputError: not a number with an optional unit.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not found or found[2].upper() not in _UNITS:
        raise InputError(f"{flag}: '{text}' is not a size; write for example 90MB, 8GiB or a number of bytes")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def require_available(flag: str, value: str | None, available: Iterable[str]) -> None:
    """Refuse a value of `flag` that a later version will know.

    Raises:
        InputError: `value` is given and not one of `available`.
    """
    known = list(available)
    if value is not None and value not in known:
        choices = ", ".join(known) or "nothing, leave it out"
        raise InputError(f"{flag} {value}: not available in this version of anybit; available here: {choices}")


def check_directory(directory: Path) -> Path:
    """`directory`, if it looks like an anybit checkpoint.

    Raises:
        InputError: there is no such directory, or it holds no ledger.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory; make one with `anybit quantize MODEL --out {directory}`")
    if not (directory / "ledger.json").is_file():
        raise InputError(
            f"{directory}: not an anybit checkpoint (no ledger.json); make one with `anybit quantize MODEL --out DIR`"
        )
    return directory
