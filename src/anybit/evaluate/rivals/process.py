"""Other engines as processes: one command that ends, or a worker that answers one request after the other."""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anybit.evaluate.rivals.contract import RivalFailed, Speed

CONVERT_SECONDS = 1800.0
MEASURE_SECONDS = 600.0


def run_command(command: Sequence[object], *, seconds: float, env: Mapping[str, str] | None = None) -> str:
    """The stdout of a command.

    Raises:
        RivalFailed: it is not there, took longer than `seconds`, or ended badly; with its last line of output.
    """
    name = Path(str(command[0])).name
    try:
        done = subprocess.run(
            [*map(str, command)], capture_output=True, text=True, errors="replace", timeout=seconds, env=clean(env)
        )
    except subprocess.TimeoutExpired:
        raise RivalFailed(f"{name} took more than {seconds:.0f} s") from None
    except OSError as error:
        raise RivalFailed(f"{name}: {error.strerror}") from None
    if done.returncode:
        raise RivalFailed(f"{name} ended with status {done.returncode}: {last_line(done.stderr or done.stdout)}")
    return done.stdout


def clean(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Our environment variables without those that would lead another interpreter into our packages, and `extra`."""
    ours = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    return ours | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | dict(extra or {})


def last_line(output: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def cause(output: str) -> str:
    """The first line that names an exception (later ones follow from it), without a log's prefix; else the last line."""
    found = re.search(r"\b([A-Z]\w*(?:Error|Unavailable): .+)", output)
    return found[1][:300] if found else last_line(output)


class Worker:
    """A process that reads `{"prompt": P, "new": N}` lines and writes one JSON line to each; one more when it is ready.

    It stays loaded between rounds, asleep in a read, so that a round costs a measurement and not a load.
    """

    def __init__(
        self, label: str, weight_bytes: int, command: Sequence[object], env: Mapping[str, str] | None = None
    ) -> None:
        self.label, self.weight_bytes = label, weight_bytes
        self._unread = b""
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # closed by `close`
        try:
            self._process = subprocess.Popen(
                [*map(str, command)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                bufsize=0,  # so that what `select` sees is all there is
                env=clean(env),
            )
        except OSError as error:
            self._errors.close()
            raise RivalFailed(f"{Path(str(command[0])).name}: {error.strerror}") from None
        try:
            self._answer()
        except RivalFailed:
            self.close()
            raise

    def measure(self, prompt_tokens: int, new_tokens: int) -> Speed:
        """See `Contestant`."""
        answer = self.ask({"prompt": prompt_tokens, "new": new_tokens})
        return Speed(answer.get("prefill"), answer.get("decode"))

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Its answer to one request. Raises RivalFailed when it ends instead, or takes longer than `MEASURE_SECONDS`."""
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
        except OSError:  # it has ended; why is in what it wrote
            raise RivalFailed(self._ending()) from None
        return self._answer()

    def close(self) -> None:
        """End the process, asked nicely first."""
        if self._process.stdin and not self._process.stdin.closed:
            with contextlib.suppress(OSError):  # a pipe whose reader is gone
                self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        """The next line that is a JSON object; libraries may print other lines."""
        deadline = time.monotonic() + MEASURE_SECONDS
        while True:
            line, newline, rest = self._unread.partition(b"\n")
            if not newline:
                self._unread += self._read(deadline)
                continue
            self._unread = rest
            if line.startswith(b"{"):
                return dict(json.loads(line))

    def _read(self, deadline: float) -> bytes:
        """Some bytes of its stdout, as soon as there are any."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as ready:
            ready.register(self._process.stdout, selectors.EVENT_READ)
            if not ready.select(timeout=max(0.0, deadline - time.monotonic())):
                self._process.kill()
                raise RivalFailed(f"no answer within {MEASURE_SECONDS:.0f} s")
        some = os.read(self._process.stdout.fileno(), 1 << 16)
        if not some:
            raise RivalFailed(self._ending())
        return some

    def _ending(self) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        return f"its process ended with status {status}: {cause(self._errors.read())}"
