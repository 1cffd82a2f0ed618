"""`anybit export`: an anybit checkpoint in another engine's format, exactly, or with every loss listed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from anybit.calibration.progress import Progress, silent
from anybit.checkpoint.partial import check_apart
from anybit.errors import InputError, nearest
from anybit.integrations.exchange.account import Account
from anybit.integrations.exchange.checkpoint import Checkpoint
from anybit.integrations.exchange.place import check_free, written_whole

# format -> (module with `write`, whether it is a directory)
FORMATS = {
    "compressed-tensors": ("anybit.integrations.compressed_tensors.write", True),
    "gptq": ("anybit.integrations.gptq", True),
    "awq": ("anybit.integrations.awq", True),
    "gguf": ("anybit.integrations.gguf.write", False),
    "onnx": ("anybit.integrations.onnx.write", True),
}


def export(
    directory: str | Path,
    *,
    to: str,
    out: str | Path,
    precision: int | None = None,
    allow_loss: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write `directory` as format `to` at `out`; returns `format, path, lossless, precision, size_bytes, notes`.

    Args:
        directory: an anybit checkpoint.
        to: a key of `FORMATS`.
        out: a directory, or for gguf a file.
        precision: the width at which nested layers are read (default: all of it).
        allow_loss: write the nearest where the format cannot say a layer exactly, and list it in `notes`.

    Raises:
        InputError: an unknown format, an `out` that is in use, or something the format cannot say. Nothing is written then.
    """
    if to not in FORMATS:
        raise InputError(f"unknown format '{to}'{nearest(to, FORMATS)}")
    module, is_directory = FORMATS[to]
    path = Path(out)
    check_free(path, overwrite, is_directory)
    check_apart(path, Path(directory))
    account = Account(to, allow_loss)
    source = Checkpoint(Path(directory), precision)
    source.check_names(account)
    with written_whole(path, overwrite, is_directory) as root:
        importlib.import_module(module).write(source, root, account, progress or silent)
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {
        "format": to,
        "path": str(path),
        "lossless": account.lossless,
        "precision": precision,
        "size_bytes": sum(file.stat().st_size for file in files),
        "notes": account.lines(),
    }
