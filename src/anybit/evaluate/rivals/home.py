"""Where `make rivals` puts other engines: their environments and binaries, outside of ours."""

from __future__ import annotations

import os
from pathlib import Path

HINT = "make rivals"
"""How to get a rival that is missing."""


def rivals_home() -> Path:
    """The folder of the rivals: `$ANYBIT_RIVALS`, or `~/.cache/anybit/rivals`. Not created here."""
    return Path(os.environ.get("ANYBIT_RIVALS") or Path.home() / ".cache" / "anybit" / "rivals").expanduser()


def environment_python(name: str) -> Path:
    """The interpreter of the rival `name`'s own environment, there or not."""
    return rivals_home() / name / "venv" / "bin" / "python"
