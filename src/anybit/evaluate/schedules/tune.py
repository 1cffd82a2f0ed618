"""`anybit schedule tune`: static switch points of a task, chosen by free-running texts on its validation split."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from anybit.calibration.progress import Progress, silent
from anybit.engine.schedule import FixedSchedule
from anybit.engine.schedulers.artefact import save
from anybit.engine.schedulers.resolve import schedule_path
from anybit.engine.schedulers.static import PARTS, chain_of
from anybit.errors import InputError
from anybit.evaluate.bootstrap import paired_bootstrap
from anybit.evaluate.schedules.search import Found, Option, Target, search
from anybit.evaluate.schedules.subject import Subject
from anybit.evaluate.tasks.find import find_task

SMALL_SAMPLE = 30


def tune(
    subject: Subject,
    task_name: str,
    *,
    target: Target,
    chain: tuple[int, ...] | None = None,
    samples: int = 32,
    length: int | None = None,
    out: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Choose switch points and write them.

    Args:
        chain: precisions to use; default: the checkpoint's from 4 bits down (all, where there are fewer than two).
        samples: validation prompts.
        length: most new tokens; default: the task's.
        out: file to write; default: `DIR/schedules/TASK.json`.

    Returns:
        What was written, with every schedule tried under `options`: `schedule, prefill, bits, rouge` and the difference to
        the highest precision with its 95 % interval.

    Raises:
        InputError: unknown task or precision. PromiseError: a budget that no schedule meets.
    """
    started = time.perf_counter()
    task = find_task(task_name)
    used = chain_of(chain or default_chain(subject.lanes.precisions))
    if len(used) < 2:
        raise InputError(f"--chain {used[0]}: a schedule needs at least two precisions")
    subject.check(used)
    prompts = subject.prompts(task, "validation", samples, length, progress=progress)

    def measure(schedule: FixedSchedule, prefill: int) -> Option:
        runs = subject.run(prompts, schedule, prefill, progress, f"texts {prefill}:{spell(schedule)}")
        return Option(schedule, prefill, runs.mean_bits, tuple(runs.rouge))

    found = search(used, prompts.length, target, measure)
    path = out or schedule_path(subject.directory, task.name)
    facts = {
        "kind": "static",
        "task": task.name,
        "precisions": sorted(found.best.schedule.precisions, reverse=True),
        "prefill": found.best.prefill,
        "switches": [list(switch) for switch in found.best.schedule.switches],
        "grid": [PARTS, prompts.length],
        "length": prompts.length,
        "target": {"rouge_loss": target.loss, "mean_bits": target.bits},
        "split": "validation",
        "samples": samples,
        "reference": subject.float_model.name,
        "fingerprint": subject.fingerprint,
        "options": [row(option, found) for option in found.options],
    }
    save(path, facts)
    return facts | {"out": str(path), "best": row(found.best, found), "seconds": time.perf_counter() - started}


def default_chain(available: tuple[int, ...]) -> tuple[int, ...]:
    """The precisions PMPD is about: 4 bits and below, where there are two; else all."""
    low = [bits for bits in available if bits <= 4]
    return chain_of(low if len(low) > 1 else available)


def spell(schedule: FixedSchedule) -> str:
    """As `--schedule` takes it."""
    if len(schedule.switches) == 1:
        return str(schedule.switches[0][1])
    return ",".join(f"{bits}@{first}" for first, bits in schedule.switches)


def row(option: Option, found: Found) -> dict[str, Any]:
    """JSON of one tried schedule."""
    loss = paired_bootstrap(option.quality, found.top.quality)
    return {
        "schedule": spell(option.schedule),
        "prefill": option.prefill,
        "bits": option.bits,
        "rouge": option.mean,
        "difference": loss.mean,
        "low": loss.low,
        "high": loss.high,
    }
