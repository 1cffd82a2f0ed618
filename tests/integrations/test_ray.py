"""Three Ray workers, one of them killed in the middle of a block: the bytes are those of one process."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="Ray is not installed (pip install anybit[ray])")

import anybit
from anybit.errors import CalibrationError
from anybit.integrations.ray import on_ray
from tiny_checkpoints import TEXT
from tiny_models import save_tiny

pytestmark = [
    pytest.mark.slow,  # a cluster starts, and each of its workers imports torch
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]
OPTIONS = {"recipe": "gptq-w4", "samples": 8, "seq_len": 64, "block_inputs": "float"}
LAYERS = 10


def digest(directory: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(directory.iterdir())}


def busy_workers() -> list[int]:
    """Processes of this cluster that are in a block now: Ray names them after the function they run."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if (
                entry.name.isdigit()
                and (entry / "cmdline").read_bytes().startswith(b"ray::_quantize_block")
                and f"ANYBIT_TEST_RAY={os.getpid()}\0".encode() in (entry / "environ").read_bytes()
            ):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def kill_one(partial: Path, killed: list[int]) -> None:
    """Once a first block is done, kill a worker that is in another."""
    until = time.monotonic() + 300
    while time.monotonic() < until:
        if list(partial.glob("state/rows-*.json")) and (busy := busy_workers()):
            os.kill(busy[0], signal.SIGKILL)
            killed.append(busy[0])
            return
        time.sleep(0.002)


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ray")
    save_tiny("llama", directory / "float", num_hidden_layers=LAYERS)
    (directory / "text.txt").write_text("".join(TEXT[i % 7 :] for i in range(90)))
    return directory


def test_a_killed_worker_changes_nothing(where, monkeypatch):
    monkeypatch.setenv("ANYBIT_TEST_RAY", str(os.getpid()))
    model, text, killed = str(where / "float"), str(where / "text.txt"), []
    anybit.quantize(model, out=str(where / "one"), calibration=text, threads=1, **OPTIONS)
    killer = threading.Thread(target=kill_one, args=(where / "three.partial", killed))
    killer.start()
    anybit.quantize(model, out=str(where / "three"), calibration=text, spread=on_ray(3, threads=1), **OPTIONS)
    killer.join()
    assert killed
    assert digest(where / "three") == digest(where / "one")
    anybit.load(where / "three")


def test_what_a_worker_refuses_is_said_as_it_would_be_here(where):
    save_tiny("mixtral", where / "experts")
    with pytest.raises(CalibrationError, match="--allow-unseen-experts"):
        anybit.quantize(
            str(where / "experts"),
            out=str(where / "never"),
            calibration=str(where / "text.txt"),
            spread=on_ray(1, threads=1),
            **OPTIONS | {"samples": 1, "seq_len": 2},
        )
    assert not (where / "never").exists()
