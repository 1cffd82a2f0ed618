"""Schedule files: the same decisions after a round trip, and everything that is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from anybit.engine.schedulers.artefact import fingerprint, load, read, save
from anybit.engine.schedulers.confidence import ConfidenceSchedule
from anybit.engine.schedulers.learned import LearnedSchedule
from anybit.engine.schedulers.resolve import prefill_bits, resolve, schedule_path
from anybit.errors import AnybitError, FormatError, InputError
from schedule_case import Prompt, head

ALL = (2, 3, 4)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A directory with a ledger, which is all that a schedule looks at."""
    rows = [{"name": "a", "sha256": {"weight": "11", "scale": "22"}}]
    (tmp_path / "ledger.json").write_text(json.dumps({"tensors": rows, "float_tensors": {"norm": "33"}}))
    return tmp_path


def facts(checkpoint: Path, **more) -> dict:
    common = {
        "kind": "learned",
        "precisions": [4, 3, 2],
        "prefill": 4,
        "parts": 3,
        "fingerprint": fingerprint(checkpoint),
    }
    return common | more


def test_a_trained_schedule_decides_the_same_after_a_round_trip(checkpoint: Path) -> None:
    made = LearnedSchedule((4, 3, 2), (head(1), head(2)), 4)
    path = schedule_path(checkpoint, "learned")
    save(path, facts(checkpoint), [h.tensors for h in made.heads])
    found = resolve("auto", checkpoint, ALL)
    assert prefill_bits(found) == 4
    states = [(made.start(Prompt(at), 90), found.start(Prompt(at), 90)) for at in range(50)]
    assert all(ours == theirs for ours, theirs in states)
    assert len({tuple(ours.switches) for ours, _ in states}) > 1


def test_a_tuned_schedule(checkpoint: Path) -> None:
    tuned = facts(checkpoint, kind="static", precisions=[4, 2], switches=[[0, 4], [7, 2]])
    save(schedule_path(checkpoint, "news"), tuned)
    found = resolve("task:news", checkpoint, ALL)
    state = found.start(None, 9)  # type: ignore[arg-type]
    assert [found.bits(state, t) for t in (0, 6, 7)] == [4, 4, 2]
    with pytest.raises(InputError, match="did you mean 'news'"):
        resolve("task:nwes", checkpoint, ALL)
    with pytest.raises(InputError, match="wants 2 bits; this checkpoint holds"):
        resolve("task:news", checkpoint, (3, 4))
    with pytest.raises(InputError, match="not nested"):
        resolve("task:news", checkpoint, (4,))
    save(schedule_path(checkpoint, "news"), tuned | {"prefill": 8})
    with pytest.raises(InputError, match="reads prompts at 8 bits"):
        resolve("task:news", checkpoint, ALL)


def test_a_schedule_of_another_checkpoint(checkpoint: Path) -> None:
    path = schedule_path(checkpoint, "learned")
    save(path, facts(checkpoint), [head(1).tensors, head(2).tensors])
    ledger = json.loads((checkpoint / "ledger.json").read_text())
    ledger["tensors"][0]["sha256"]["scale"] = "23"
    (checkpoint / "ledger.json").write_text(json.dumps(ledger))
    with pytest.raises(FormatError, match="another checkpoint"):
        resolve("auto", checkpoint, ALL)


@pytest.mark.parametrize("damage", ["missing", "json", "kind", "head", "version", "metadata", "bytes"])
def test_damaged_files(checkpoint: Path, damage: str) -> None:
    path = checkpoint / ("x.json" if damage in ("json", "kind") else "x.safetensors")
    heads = [head(1).tensors] if damage == "head" else [head(1).tensors, head(2).tensors]
    if damage == "json":
        path.write_text("{")
    elif damage == "kind":
        save(path, facts(checkpoint, kind="oracle"))
    elif damage == "metadata":
        from safetensors.numpy import save_file

        save_file({"a": np.zeros(1, np.float32)}, path)
    elif damage != "missing":
        save(path, facts(checkpoint, **({"version": 9} if damage == "version" else {})), heads)
        if damage == "bytes":
            path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(AnybitError, match=r"no such schedule|not a schedule or is damaged|version 9"):
        read(path)
    with pytest.raises(AnybitError):
        load(path, checkpoint)


def test_specs(checkpoint: Path) -> None:
    assert resolve("confidence:4,2", checkpoint, ALL) == ConfidenceSchedule((4, 2))
    assert resolve("random:3,2", checkpoint, ALL).precisions == (3, 2)
    assert resolve("4@0,3@9", checkpoint, ALL).precisions == (4, 3)
    for spec, why in (("auto", "no trained schedule"), ("confidence:x", "write precisions"), ("random:4,8", "wants 8"),
                      ("task:../x", "not tuned"), ("task:", "not tuned"), ("4,3", "write bits")):  # fmt: skip
        with pytest.raises(InputError, match=why):
            resolve(spec, checkpoint, ALL)
