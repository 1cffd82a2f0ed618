"""The command line: `main` is the entry point, every command is one thin file beside it.

Nothing here imports torch or transformers at module level, so `anybit --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    0 ok, 1 a bug, 2 wrong usage or input, 3 a promise not met, 130 interrupted.

    Args:
        argv: the words after `anybit`; None takes them from the process.
    """
    from anybit.cli.app import app
    from anybit.cli.errors import run

    if not sys.stderr.isatty():
        # Bars that transformers and the hub draw by themselves; ours know when nobody watches.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    words = list(sys.argv[1:] if argv is None else argv)
    # A bare `anybit` asks what it can do.
    return run(lambda: app(words or ["--help"], prog_name="anybit", standalone_mode=False))
