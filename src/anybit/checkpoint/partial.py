"""A checkpoint being written: everything goes to `OUT.partial`, which becomes OUT in one rename when all of it is
there.

Each finished block is one shard, one file of hidden states and one line of progress, committed in that order by
atomic renames;
whatever moment the process dies in, the last committed block is intact and `resume` goes on from it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from anybit.checkpoint.ledger import LEDGER, Ledger
from anybit.errors import InputError, PromiseError

STATE = "state"


class Partial:
    """`OUT.partial` with its shards, and `state/` with what resuming needs."""

    def __init__(self, out: Path) -> None:
        self.out, self.root = out, beside(out, ".partial")
        self.state = self.root / STATE

    def begin(self, identity: dict[str, Any], resume: bool, overwrite: bool) -> dict[str, Any]:
        """Create the directory, or find where to go on; returns the progress so far, empty for a fresh start.

        Raises:
            InputError: OUT or a partial run is in the way, or the partial run is another job (the difference is named).
        """
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"{self.out} is a file; give a directory for --out")
        if self.out.is_dir() and any(self.out.iterdir()) and not overwrite:
            raise InputError(f"{self.out} is not empty; choose another --out, or pass --overwrite")
        if self.root.exists() and resume:
            return self._resume(identity)
        if self.root.exists() and not overwrite:
            raise InputError(
                f"{self.root} holds an interrupted run; pass --resume to go on, --overwrite to start again"
            )
        if self.root.exists():
            shutil.rmtree(self.root)
        self.state.mkdir(parents=True)
        write_json(self.state / "identity.json", identity)
        return {}

    def finished(self, identity: dict[str, Any]) -> Ledger | None:
        """The ledger of OUT when a run of this very job has ended already; None when there is something left to do.

        Raises:
            InputError: OUT holds another job (the difference is named).
        """
        if self.root.exists() or not (self.out / LEDGER).is_file():
            return None
        ledger = Ledger.read(self.out)
        _same_job(self.out, ledger.identity, identity)
        return ledger

    def _resume(self, identity: dict[str, Any]) -> dict[str, Any]:
        recorded = self.state / "identity.json"
        if not recorded.is_file():  # died before the first commit: nothing to keep
            shutil.rmtree(self.root)
            self.state.mkdir(parents=True)
            write_json(recorded, identity)
            return {}
        _same_job(self.root, json.loads(recorded.read_text()), identity)
        progress = self.state / "progress.json"
        return json.loads(progress.read_text()) if progress.is_file() else {}

    def commit(self, progress: dict[str, Any]) -> None:
        """Make `progress` (JSON) the point to resume from; what it refers to must have been written before."""
        write_json(self.state / "progress.json", progress)

    def finish(self) -> None:
        """Drop the state and rename to OUT; the last step, after every other file was written."""
        shutil.rmtree(self.state)
        sync_directory(self.root)
        if self.out.exists():
            old = self.out.with_name(self.out.name + ".old")
            shutil.rmtree(old, ignore_errors=True)
            self.out.rename(old)
            self.root.rename(self.out)
            shutil.rmtree(old)
        else:
            self.root.rename(self.out)
        sync_directory(self.out.parent)


def check_apart(out: Path, source: Path) -> None:
    """Raise InputError if writing `out` would replace `source`, a file or directory that is read."""
    kept = source.resolve()
    if out.resolve() in (kept, *kept.parents):
        raise InputError(f"--out {out} would replace {source}, which is read; choose another --out")


def beside(out: Path, suffix: str) -> Path:
    """`out` with `suffix` on its name. Raises InputError for ".", ".." and "/", which have none to put it on."""
    if out.name in ("", ".."):
        raise InputError(f"--out {out} has no name of its own; give the directory by its name")
    return out.with_name(out.name + suffix)


def _same_job(where: Path, recorded: dict[str, Any], identity: dict[str, Any]) -> None:
    difference = next(iter(differences(recorded, json.loads(json.dumps(identity)))), None)
    if difference:
        raise InputError(
            f"{where} is another job: {difference}; repeat its options, or pass --overwrite to start again"
        )


@contextmanager
def room_on_disk(what: Path) -> Iterator[None]:
    """Turn "no space left" into one line with the fix; everything committed so far stays for `--resume`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) and "No space left" not in str(error):
            raise
        raise PromiseError(f"no disk space left while writing {what}; free some and go on with --resume") from error
    except Exception as error:  # safetensors wraps the system's error in its own
        if "No space left" not in str(error):
            raise
        raise PromiseError(f"no disk space left while writing {what}; free some and go on with --resume") from error


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file, atomically. The same tensors give the same bytes."""
    temporary = path.with_name(path.name + ".tmp")
    with room_on_disk(path):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"})
        _sync(temporary)
    temporary.replace(path)
    sync_directory(path.parent)


def write_json(path: Path, data: Any) -> None:
    """A JSON file, atomically."""
    temporary = path.with_name(path.name + ".tmp")
    with room_on_disk(path):
        temporary.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
        _sync(temporary)
    temporary.replace(path)
    sync_directory(path.parent)


def differences(before: Any, now: Any, at: str = "") -> Iterator[str]:
    """Each leaf where two JSON values differ, as `a.b: old -> new`."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from differences(before.get(key), now.get(key), f"{at}.{key}" if at else key)
    elif before != now:
        yield f"{at} was {json.dumps(before)}, now {json.dumps(now)}"


def sync_directory(path: Path) -> None:
    """Return once renames inside `path` are on the disk itself."""
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
