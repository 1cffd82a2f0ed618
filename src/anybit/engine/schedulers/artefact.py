"""Schedules on disk: `DIR/schedules/TASK.json` (tuned switch points) and `learned.safetensors` (trained heads).

Both carry the fingerprint of the checkpoint they were made for: a schedule says nothing about another one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anybit.engine.schedule import FixedSchedule, Scheduler
from anybit.engine.schedulers.activation import ActivationSchedule
from anybit.engine.schedulers.head import NAMES, Head
from anybit.engine.schedulers.learned import LearnedSchedule
from anybit.errors import FormatError, InputError

VERSION = 1
FOLDER = "schedules"
KINDS = {"static": (), "learned": NAMES, "activation": NAMES[3:]}
"""What a schedule file can hold, and the tensors of one head."""


@dataclass(frozen=True)
class TunedSchedule(FixedSchedule):
    """Tuned switch points, and the precision that the prompt has to be read at."""

    prefill: int = 0


def fingerprint(directory: Path) -> str:
    """sha256 over the names and hashes of every tensor in a checkpoint's ledger.

    Raises:
        FormatError: no ledger, or a damaged one.
    """
    path = directory / "ledger.json"
    try:
        ledger = json.loads(path.read_text(encoding="utf-8"))
        hashes = {f"{row['name']}.{key}": sha for row in ledger["tensors"] for key, sha in row["sha256"].items()}
        hashes |= dict(ledger["float_tensors"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path} is missing or damaged ({error}); restore it or quantize again") from None
    return hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest()


def save(path: Path, facts: Mapping[str, Any], heads: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write a schedule, whole or not at all.

    Args:
        path: `.json` without heads, `.safetensors` with them.
        facts: JSON; `kind, precisions, prefill, fingerprint` at least, and `switches` or `parts`.
        heads: float32 tensors of each pair.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    text = json.dumps({"version": VERSION, **facts}, indent=1)
    if heads:
        from safetensors.numpy import save_file

        tensors = {
            f"{pair}.{name}": np.ascontiguousarray(t, np.float32)
            for pair, h in enumerate(heads)
            for name, t in h.items()
        }
        save_file(tensors, partial, metadata={"anybit": text})
    else:
        partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Facts and heads of a schedule file.

    Raises:
        InputError: no such file. FormatError: not a schedule, damaged, or of a later version.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such schedule; make one with `anybit schedule tune` or `anybit schedule train`")
    try:
        facts, tensors = _contents(path)
        kind, version = facts["kind"], int(facts["version"])
        chain = [int(bits) for bits in facts["precisions"]]
        names = KINDS[kind]
        heads = [{name: tensors[f"{pair}.{name}"] for name in names} for pair in range(len(chain) - 1 if names else 0)]
        _ = int(facts["prefill"]), str(facts["fingerprint"]), facts["parts" if names else "switches"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise FormatError(f"{path} is not a schedule or is damaged ({error!r}); tune or train it again") from None
    if version > VERSION:
        raise FormatError(f"{path} has version {version}, this anybit reads {VERSION}; update anybit")
    return facts, heads


def load(path: Path, directory: Path) -> Scheduler:
    """The scheduler in a file, if it was made for this checkpoint.

    Raises:
        FormatError: damaged, or made for other weights.
    """
    facts, heads = read(path)
    if facts["fingerprint"] != fingerprint(directory):
        raise FormatError(f"{path} was made for another checkpoint than {directory}; tune or train it here")
    chain, prefill = tuple(facts["precisions"]), facts["prefill"]
    if facts["kind"] == "learned":
        return LearnedSchedule(chain, tuple(Head.restore(head) for head in heads), prefill, facts["parts"])
    if facts["kind"] == "activation":
        return ActivationSchedule(chain, tuple(heads), prefill, facts["parts"])
    return TunedSchedule(tuple((step, bits) for step, bits in facts["switches"]), prefill)


def _contents(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8")), {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            facts = json.loads((file.metadata() or {})["anybit"])
            return facts, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except SafetensorError as error:
        raise ValueError(str(error)) from None
