"""The bytes of a checkpoint depend on model, recipe, data and seed alone: not on threads, kills, or the hour."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import anybit
from anybit.errors import InputError
from tiny_models import save_tiny

KILLS = int(os.environ.get("ANYBIT_TEST_KILLS", "3"))
OPTIONS = {"recipe": "gptq-w4", "samples": 6, "seq_len": 48}
CHILD = """
import sys, time, anybit
def slow(stage, done, total): time.sleep(0.25)
anybit.quantize(sys.argv[1], recipe="gptq-w4", out=sys.argv[2], calibration=sys.argv[3], samples=6, seq_len=48,
                resume=True, threads=int(sys.argv[4]), progress=slow)
"""


def digest(directory: Path) -> dict[str, str]:
    return {
        str(f.relative_to(directory)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(directory.rglob("*"))
        if f.is_file()
    }


@pytest.fixture(scope="module")
def float_dir(tmp_path_factory):
    """Deep enough to be killed in the middle."""
    directory = tmp_path_factory.mktemp("deep") / "float"
    save_tiny("llama", directory, num_hidden_layers=10)
    return directory


@pytest.fixture(scope="module")
def whole(float_dir, text_file, tmp_path_factory):
    """An uninterrupted run on one thread."""
    out = tmp_path_factory.mktemp("whole") / "out"
    anybit.quantize(str(float_dir), out=str(out), calibration=text_file, threads=1, **OPTIONS)
    return digest(out)


@pytest.mark.parametrize(("run", "threads"), [(2, 2), (3, 2), (4, 1), (5, 3)])
def test_five_runs_give_the_same_bytes_on_any_number_of_threads(whole, float_dir, text_file, tmp_path, run, threads):
    out = tmp_path / f"run{run}"
    anybit.quantize(str(float_dir), out=str(out), calibration=text_file, threads=threads, **OPTIONS)
    assert digest(out) == whole


def test_killed_at_random_moments_and_resumed(whole, float_dir, text_file, tmp_path):
    out, moments = tmp_path / "out", random.Random(0)
    kills = 0
    for attempt in range(2 * KILLS + 2):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(float_dir), str(out), text_file, str(1 + attempt % 2)]
        )
        if kills < KILLS:
            wait_for_work(out.with_name("out.partial"), child)
            time.sleep(moments.random())
            child.send_signal(signal.SIGKILL)
        if child.wait() == 0:
            break
        kills += 1
    assert kills >= min(KILLS, 3)
    assert digest(out) == whole


def wait_for_work(partial: Path, child: subprocess.Popen[bytes]) -> None:
    """Until the child has begun to write (imports take most of a short run), or has ended."""
    before = partial.stat().st_mtime_ns if partial.exists() else 0
    for _ in range(600):
        if child.poll() is not None or (partial.exists() and partial.stat().st_mtime_ns != before):
            return
        time.sleep(0.02)


def test_resume_of_another_job_is_refused_and_named(float_dir, text_file, tmp_path):
    out = tmp_path / "out"

    def interrupt(stage, done, total):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        anybit.quantize(str(float_dir), out=str(out), calibration=text_file, progress=interrupt, **OPTIONS)
    assert not out.exists()
    with pytest.raises(InputError, match="--resume"):
        anybit.quantize(str(float_dir), out=str(out), calibration=text_file, **OPTIONS)
    with pytest.raises(InputError, match=r"recipe\.stages\.weights.*another job|another job.*weights"):
        anybit.quantize(
            str(float_dir), out=str(out), calibration=text_file, resume=True, overrides=["weights.bits=3"], **OPTIONS
        )
    with pytest.raises(InputError, match=r"another job: data"):
        anybit.quantize(str(float_dir), out=str(out), calibration=text_file, resume=True, seed=5, **OPTIONS)
    anybit.quantize(str(float_dir), out=str(out), calibration=text_file, resume=True, **OPTIONS)
    assert (out / "config.json").is_file()
    assert not out.with_name("out.partial").exists()
    before = digest(out)
    assert anybit.quantize(str(float_dir), out=str(out), calibration=text_file, resume=True, **OPTIONS)["layers"] == 72
    assert digest(out) == before
    with pytest.raises(InputError, match=r"another job: data"):
        anybit.quantize(str(float_dir), out=str(out), calibration=text_file, resume=True, seed=5, **OPTIONS)
