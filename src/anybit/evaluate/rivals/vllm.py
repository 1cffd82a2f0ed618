"""vLLM in its own environment (`make serving-env`), one engine as a process that answers requests."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from anybit.evaluate.rivals.process import Worker

_WORKER = Path(__file__).parent / "workers" / "vllm_llm.py"
HINT = "make serving-env"
"""How to get the environment."""


def serving_home() -> Path:
    """The folder of the environment: `$ANYBIT_SERVING`, or `~/.cache/anybit/serving`. Not created here."""
    return Path(os.environ.get("ANYBIT_SERVING") or Path.home() / ".cache" / "anybit" / "serving").expanduser()


def serving_python() -> Path:
    """Its interpreter, there or not."""
    return serving_home() / "venv" / "bin" / "python"


def variables(cores: str = "") -> dict[str, str]:
    """What vLLM on a CPU needs in its environment: offline, 1 GiB of cache, and `cores` in vLLM's words (`0-3`, `0|1`)."""
    fixed = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    fixed |= {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    }  # its stdout carries our answers
    return fixed | ({"VLLM_CPU_OMP_THREADS_BIND": cores} if cores else {})


def engine(directory: str | Path, *, cores: str = "", **options: Any) -> Worker:
    """An engine on a checkpoint, ready for `Worker.ask` (workers/vllm_llm.py says what it answers); close it.

    Args:
        cores: see `variables`; empty leaves it to vLLM.
        options: of `vllm.LLM`, JSON.

    Raises:
        RivalFailed: no such environment, or vLLM did not start; with its last line of output.
    """
    command = (serving_python(), _WORKER, directory, json.dumps(options))
    return Worker(f"vllm {Path(directory).name}", 0, command, variables(cores))
