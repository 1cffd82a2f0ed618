"""Which kernel is fastest here for one shape and width: measured once, remembered.

Candidates compute equal results, so a choice changes nothing but time. The memory is `autotune.json` in the cache
directory (`anybit.cache`), keyed by processor and version; deleting it costs a few milliseconds per shape.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import anybit
from anybit.cache import cache_root
from anybit.kernels import native

log = logging.getLogger("anybit")

ROUNDS = 5
CLOSE = 1.05  # within 5 % of the best the order of the candidates decides, so that noise does not
MAX_BUCKET = 64

Candidates = Mapping[str, Callable[[], object]]
Clock = Callable[[], float]


def best(candidates: Candidates, shape: tuple[int, int], bits: str, tokens: int, clock: Clock | None = None) -> str:
    """The name of the fastest candidate; on a tie within 5 %, the first of those in order.

    Args:
        candidates: name to a call that runs it once on representative operands; preferred ones first.
        shape: N, K.
        bits: the widths as text, e.g. "w2a8"; anything else that matters (group size) belongs here too.
        tokens: M; counts are put together by powers of two, above 64 all are one.
        clock: seconds; for tests.

    Raises:
        ValueError: no candidates.
    """
    if not candidates:
        raise ValueError("autotune needs at least one candidate")
    threads = native.loaded().threads() if native.native() else 0
    names = "|".join(candidates)  # another set of candidates is another question
    key = f"{shape[0]}x{shape[1]} {bits} m{bucket(tokens)} {native.isa()} t{threads} {names}"
    path = cache_root() / "autotune.json"
    known = _read(path).get(_machine(), {})
    if known.get(key) in candidates:
        return str(known[key])
    name = fastest(candidates, clock or time.perf_counter)
    _remember(path, key, name)
    return name


def bucket(tokens: int) -> int:
    """The power of two at or above `tokens`, at most 64."""
    return min(1 << max(tokens - 1, 0).bit_length(), MAX_BUCKET)


def fastest(candidates: Candidates, clock: Clock) -> str:
    """Each candidate once to warm up, then in turns; the least time of each counts."""
    for run in candidates.values():
        run()
    least = dict.fromkeys(candidates, float("inf"))
    for _ in range(ROUNDS):
        for name, run in candidates.items():
            start = clock()
            run()
            least[name] = min(least[name], clock() - start)
    limit = CLOSE * min(least.values())
    return next(name for name, seconds in least.items() if seconds <= limit)


def _machine() -> str:
    """Processor and version: another of either measures again."""
    from anybit.machine import machine

    return f"{machine()['processor']} anybit {anybit.__version__}"


def _read(path: Path) -> dict[str, dict[str, str]]:
    """What is remembered; a file that cannot be read counts as empty, because it can be measured again."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s is not readable (%s): measuring again", path, error)
        return {}
    good = isinstance(found, dict) and all(isinstance(value, dict) for value in found.values())
    return found if good else {}


def _remember(path: Path, key: str, name: str) -> None:
    """Replace the file atomically; of two processes that race, one entry is measured again."""
    found = _read(path)
    found.setdefault(_machine(), {})[key] = name
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=".autotune-")
    with os.fdopen(handle, "w") as file:
        json.dump(found, file, indent=1, sort_keys=True)
    Path(scratch).replace(path)
