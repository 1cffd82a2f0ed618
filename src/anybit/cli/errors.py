"""From an exception to one line on stderr and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable

import typer

from anybit.errors import AnybitError

INTERRUPTED = 130
"""128 + SIGINT, what shells expect from a program stopped with Ctrl-C."""

PLACES = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG}
"""What the system says of a path that a person gave; other failures of the system are looked at as bugs."""


def run(command: Callable[[], object]) -> int:
    """Call `command` and return the process exit code; a failure is one line on stderr, never a traceback by default.

    `command` may return an int (typer does for `--help` and Ctrl-C); anything else counts as success.
    """
    try:
        result = command()
    except AnybitError as error:
        return _fail(str(error), error.exit_code)
    except typer.TyperException as error:
        return _fail(f"{error.format_message().rstrip('.')}; add --help to see how", error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        result = INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has what it wanted; without this, Python complains again while flushing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno in PLACES and error.filename:
            return _fail(f"{error.filename}: {error.strerror}; give a path that may be read or written", 2)
        return _bug(error)
    except Exception as error:
        return _bug(error)
    code = result if isinstance(result, int) else 0
    return _fail("interrupted", code) if code == INTERRUPTED else code


def _fail(message: str, code: int) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return code


def _bug(error: Exception) -> int:
    """A failure nobody planned: say where it was, and how to see all of it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    if os.environ.get("ANYBIT_DEBUG") == "1":
        traceback.print_exception(error)
        return _fail(f"{type(error).__name__}: {error}", 1)
    return _fail(
        f"{type(error).__name__}: {error}{where}; this is a bug in anybit, set ANYBIT_DEBUG=1 to see the traceback", 1
    )
