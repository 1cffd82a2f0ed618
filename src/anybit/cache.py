"""The cache directory for converted models: built once, atomically, shared by every process.

`$ANYBIT_CACHE` names it; the default is `~/.cache/anybit`. Nothing here is precious: deleting it costs time only.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from anybit.errors import InputError

_CHUNK = 1 << 20


def cache_root() -> Path:
    """The cache directory, created when missing. Raises InputError when it cannot be written."""
    root = Path(os.environ.get("ANYBIT_CACHE") or Path.home() / ".cache" / "anybit").expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{root}: cannot create the cache ({error.strerror}); set ANYBIT_CACHE elsewhere") from error
    return root


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """Directory `name` of the cache, made by `build(empty_directory)` when it is not there yet.

    The work happens in a temporary sibling that is renamed at the end, so an interrupted build leaves nothing that
    looks finished, and of two processes that race one result wins.
    """
    root = cache_root()
    target = root / name
    if target.is_dir():
        return target
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
    try:
        build(scratch)
        scratch.chmod(0o755)
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():  # not the race with another process that the rename is allowed to lose
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def sampled_sha256(path: Path, strided: int = 14) -> str:
    """sha256 over the size, the first MiB, the last MiB and `strided` evenly spaced 64 KiB chunks between them.

    Reads about 3 MiB whatever the size: it tells files apart that were made differently, it is no proof against
    somebody who edits a few bytes on purpose.
    """
    digest = hashlib.sha256()
    size = path.stat().st_size
    digest.update(str(size).encode())
    with path.open("rb") as file:
        for start, length in _samples(size, strided):
            file.seek(start)
            digest.update(file.read(length))
    return digest.hexdigest()


def _samples(size: int, strided: int) -> Iterator[tuple[int, int]]:
    yield 0, _CHUNK
    for step in range(1, strided + 1):
        yield size * step // (strided + 1), _CHUNK // 16
    yield max(0, size - _CHUNK), _CHUNK
