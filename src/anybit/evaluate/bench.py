"""`anybit bench`: correctness first, then our speed beside rivals and beside what the machine can do, in one run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from anybit.checkpoint.ledger import Ledger
from anybit.errors import InputError
from anybit.evaluate.cold import beyond_cache, read_buffer
from anybit.evaluate.ours import CHECKS, open_ours
from anybit.evaluate.rivals.contract import Contestant, Rival, RivalFailed, Speed
from anybit.evaluate.rounds import BUSY_CORES, busy_cores, ratios, spread, take_turns
from anybit.kernels import native
from anybit.kernels.machine.op import Peaks, measure_peaks
from anybit.models.source import open_model

Say = Callable[[str], None]
OURS, PEAKS = "ours", "peaks"


def bench(
    directories: Sequence[Path],
    rivals: Sequence[Rival],
    *,
    threads: int,
    reference: str | None = None,
    rounds: int = 7,
    prompt: int = 512,
    new: int = 128,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Measure a checkpoint; JSON-ready.

    Args:
        directories: written by `anybit quantize`; the first is measured, others are measured beside it like rivals.
        rivals: one that is missing or fails is named through `say`, and the others go on.
        threads: of everybody.
        reference: the float model that rivals convert, default the one the ledger names.
        rounds: turns that everybody takes.
        prompt: tokens of prefill. new: tokens of decode.
        say: told one line about everything worth knowing while it happens.

    Returns:
        `checks`, `peaks`, `busy_cores` (before the start), `skipped` {rival: reason} and
        `rows`: one for decode and prefill alone and per rival, see `row`.

    Raises:
        InputError: no such model, or no native module. PromiseError: a check failed; nothing is timed then.
    """
    require_native()
    directory = directories[0]
    checks = check_all(directories, say)
    busy = warn_when_busy(say)
    skipped: dict[str, str] = {}

    def skip(name: str, reason: object) -> None:
        skipped[name] = str(reason)
        say(f"{name}: left out, {reason}")

    with ExitStack() as stack:
        theirs = start_rivals(rivals, directory, reference, threads, skip, stack) if rivals else {}
        ours, *others = [opened(path, threads, stack) for path in directories]
        theirs |= {f"{o.label} {path.name}": o for o, path in zip(others, directories[1:], strict=True)}
        buffer = read_buffer()
        measures: dict[str, Callable[[], Any]] = {PEAKS: lambda: measure_peaks(buffer)}
        for name, contestant in {OURS: ours, **theirs}.items():
            measures[name] = partial(contestant.measure, prompt, new)
        say(f"{rounds} rounds of {', '.join((ours.label, *theirs))}")
        results = take_turns(measures, rounds, skip, RivalFailed)
    peaks: list[Peaks] = results.pop(PEAKS)
    rows = table(directory, results, {OURS: ours, **theirs}, peaks, prompt, new)
    return {
        "checks": checks,
        "peaks": summary(peaks, threads),
        "busy_cores": busy,
        "skipped": skipped,
        "rows": rows,
    }


def check_all(directories: Sequence[Path], say: Say) -> dict[str, str]:
    """What every check found, of others than the first with the checkpoint's name behind the check's."""
    found = {}
    for i, directory in enumerate(directories):
        for name, check in CHECKS:
            label = f"{name} {directory.name}" if i else name
            found[label] = check(directory)
            say(f"{label}: {found[label]}")
    return found


def require_native() -> None:
    """Refuse where nothing native is built: neither we nor the machine could be measured."""
    if native.native() is None:
        raise InputError("anybit bench needs the native module; install anybit with a C++ compiler")


def warn_when_busy(say: Say) -> float | None:
    """Cores that other processes keep busy now; says so when it is enough to spoil figures."""
    busy = busy_cores()
    if busy is not None and busy > BUSY_CORES:
        say(
            f"warning: other processes keep {busy:.1f} of {os.cpu_count()} cores busy (load average "
            f"{os.getloadavg()[0]:.1f}); engines that spin lose up to 5x then, so trust no figure of this run"
        )
    return busy


def opened(directory: Path, threads: int, stack: ExitStack) -> Contestant:
    """`open_ours`; `stack` closes it."""
    contestant = open_ours(directory, threads)
    stack.callback(contestant.close)
    return contestant


def start_rivals(
    rivals: Sequence[Rival],
    directory: Path,
    reference: str | None,
    threads: int,
    skip: Callable[[str, object], None],
    stack: ExitStack,
) -> dict[str, Contestant]:
    """Those that are there and start, by label; `stack` closes them."""
    started: dict[str, Contestant] = {}
    model: Path | None = None
    for rival in rivals:
        if reason := rival.missing():
            skip(rival.name, reason)
            continue
        model = model or open_model(reference or Ledger.read(directory).model).path
        try:
            contestant = rival.start(rival.prepare(model), threads)
        except RivalFailed as error:
            skip(rival.name, error)
            continue
        stack.callback(contestant.close)
        started[contestant.label] = contestant
    return started


def summary(peaks: Sequence[Peaks], threads: int) -> dict[str, Any]:
    """Medians over the rounds; `beyond_cache`: whether the bandwidth is surely that of memory."""
    last = asdict(peaks[-1])
    measured = [key for key, value in last.items() if isinstance(value, float)]
    medians = {key: spread([getattr(peak, key) for peak in peaks]).median for key in measured}
    return last | medians | {"beyond_cache": beyond_cache(peaks[-1].read_buffer), "threads": threads}


def table(
    directory: Path,
    results: dict[str, list[Speed]],
    contestants: dict[str, Contestant],
    peaks: Sequence[Peaks],
    prompt: int,
    new: int,
) -> list[dict[str, Any]]:
    """Rows of decode, then of prefill: ours alone when no rival is left."""
    bytes_read, weights = work_per_token(directory)
    rows = []
    for part, tokens in (("decode", new), ("prefill", prompt)):
        speeds = {name: [float(getattr(speed, part)) for speed in many] for name, many in results.items()}
        ours = speeds.pop(OURS)
        decode = part == "decode"
        limits = limits_of(ours, peaks, bytes_read=bytes_read if decode else 0, operations=0 if decode else 2 * weights)
        alone = row({"what": f"{part} {tokens}", "unit": "tokens/s", "engine": contestants[OURS].label}, ours, limits)
        for name, theirs in speeds.items():
            about = {"rival_name": name, "rival_bytes": contestants[name].weight_bytes}
            rows.append(alone | about | beside(ours, theirs))
        if not speeds:
            rows.append(alone)
    return rows


def limits_of(
    rates: Sequence[float], peaks: Sequence[Peaks], *, bytes_read: int = 0, operations: int = 0
) -> dict[str, float | None]:
    """Parts of the machine's limits, medians over the rounds: what slows a round down slows its limit too.

    Args:
        rates: calls or tokens a second, one a round, beside that round's `peaks`.
        bytes_read: of one call, 0 where reading is not what limits. operations: likewise, 2 per multiply-add.

    Returns:
        `of_bandwidth`; `of_peak`, of the fastest int8 unit (tiles where there are some); `of_vector_peak`, of VPDPBUSD.
        None where it says nothing.
    """

    def part(work: int, limits: list[float]) -> float | None:
        return ratios([rate * work for rate in rates], limits).median if work and all(limits) else None

    return {
        "of_bandwidth": part(bytes_read, [peak.read_bytes for peak in peaks]),
        "of_peak": part(operations, [peak.int8 for peak in peaks]),
        "of_vector_peak": part(operations, [peak.int8_vector for peak in peaks]),
    }


def row(what: dict[str, Any], rates: Sequence[float], limits: dict[str, float | None]) -> dict[str, Any]:
    """One line: `what, ours, rival, ratio, of_bandwidth, of_peak` and `unit, engine, of_vector_peak, n, ours_spread`.

    Rates are medians; a spread is [smallest, largest]; `rival` and `ratio` are None until `beside` is added.
    """
    ours = spread(rates)
    about = {"ours": ours.median, "rival": None, "ratio": None, **limits}
    return what | about | {"n": ours.n, "ours_spread": [ours.low, ours.high]}


def beside(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """`rival, rival_spread, ratio, ratio_spread`; the ratio is the median of each round's."""
    rival, ratio = spread(theirs), ratios(ours, theirs)
    spreads = {"rival_spread": [rival.low, rival.high], "ratio_spread": [ratio.low, ratio.high]}
    return {"rival": rival.median, "ratio": ratio.median, **spreads}


def work_per_token(directory: Path) -> tuple[int, int]:
    """Bytes of weights that one decode step reads, and weights that a prompt's token is multiplied with.

    A tied embedding is read as the head; an untied one is only looked up. Prefill computes the head for one token.
    """
    ledger = Ledger.read(directory)
    embedding = [tensor for tensor in ledger.tensors if "embed" in tensor.name]
    head = [tensor for tensor in ledger.tensors if tensor.name.endswith("lm_head")]
    untied = head or any("lm_head" in name for name in ledger.float_tensors)
    looked_up = sum(tensor.stored_bytes for tensor in embedding) if untied else 0
    ends = {tensor.name for tensor in embedding + head}
    weights = sum(tensor.shape[0] * tensor.shape[1] for tensor in ledger.tensors if tensor.name not in ends)
    return ledger.size_bytes - looked_up, weights
