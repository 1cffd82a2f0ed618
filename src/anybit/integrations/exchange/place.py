"""Where an export goes: a temporary name that becomes PATH in one rename when all of it is there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anybit.checkpoint.partial import beside, room_on_disk, sync_directory
from anybit.errors import InputError


@contextmanager
def written_whole(out: Path, overwrite: bool, directory: bool) -> Iterator[Path]:
    """A temporary path beside `out` to write to; it takes the place of `out` at the end, or is removed when the block fails.

    Raises:
        InputError: `out` holds something and `overwrite` was not asked for, or is the wrong kind of thing.
    """
    check_free(out, overwrite, directory)
    root = beside(out, ".exporting")
    _remove(root)
    try:
        (root if directory else root.parent).mkdir(parents=True, exist_ok=True)
        with room_on_disk(out):
            yield root
        old = beside(out, ".old")
        _remove(old)
        if out.exists():
            out.rename(old)
        root.rename(out)
        sync_directory(out.parent)
        _remove(old)
    finally:
        _remove(root)


def check_free(out: Path, overwrite: bool, directory: bool) -> None:
    """Raise InputError unless `out` may be written."""
    if out.is_dir() and not directory:
        raise InputError(f"{out} is a directory; this format is one file, give a file name for --out")
    if out.is_file() and directory:
        raise InputError(f"{out} is a file; this format is a directory, give another name for --out")
    used = any(out.iterdir()) if out.is_dir() else out.exists()
    if used and not overwrite:
        raise InputError(f"{out} is not empty; choose another --out, or pass --overwrite")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
