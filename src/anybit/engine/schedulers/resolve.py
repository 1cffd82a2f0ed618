"""What `--schedule SPEC` means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from anybit.engine.schedule import Scheduler, check_available, parse_schedule
from anybit.engine.schedulers.artefact import FOLDER, load
from anybit.engine.schedulers.confidence import ConfidenceSchedule
from anybit.engine.schedulers.random import RandomSchedule
from anybit.engine.schedulers.static import chain_of
from anybit.errors import InputError, nearest

LEARNED = "learned.safetensors"


def resolve(spec: str, directory: str | Path, available: Sequence[int]) -> Scheduler:
    """The scheduler of a SPEC.

    Args:
        spec: `4` or `4@0,3@32` (bits @ decode step), `auto` (trained with `anybit schedule train`), `task:NAME` (tuned with
            `anybit schedule tune`), a schedule file, `confidence:4,3` or `random:4,3`.
        directory: the checkpoint.
        available: its precisions.

    Raises:
        InputError: no such schedule, a precision the checkpoint does not hold, or a checkpoint that is not nested.
        FormatError: a schedule that is damaged or was made for another checkpoint.
    """
    scheduler = _find(spec, Path(directory))
    check_available(scheduler, available)
    prefill = prefill_bits(scheduler)
    if prefill is not None and prefill not in available:
        raise InputError(
            f"--schedule {spec} reads prompts at {prefill} bits; this checkpoint holds {sorted(available)}"
        )
    return scheduler


def prefill_bits(scheduler: Scheduler) -> int | None:
    """The precision a tuned or trained schedule was made for reading prompts at; None: it does not care."""
    return getattr(scheduler, "prefill", None)


def schedule_path(directory: Path, name: str) -> Path:
    """Where the schedule of a task lies; `learned` is the trained one."""
    return directory / FOLDER / (LEARNED if name == "learned" else f"{name}.json")


def _find(spec: str, directory: Path) -> Scheduler:
    kind, _, rest = spec.partition(":")
    if spec == "auto":
        path = schedule_path(directory, "learned")
        if not path.is_file():
            raise InputError(
                f"--schedule auto: {directory} has no trained schedule; run `anybit schedule train {directory}`"
            )
        return load(path, directory)
    if kind == "task":
        return _of_task(rest, directory)
    if kind in ("confidence", "random") and rest:
        chain = _chain(spec, rest)
        return ConfidenceSchedule(chain) if kind == "confidence" else RandomSchedule(chain)
    if Path(spec).suffix in (".json", ".safetensors"):
        return load(Path(spec), directory)
    return parse_schedule(spec)


def _of_task(task: str, directory: Path) -> Scheduler:
    path = schedule_path(directory, task)
    if not task or Path(task).name != task or not path.is_file():
        known = [file.stem for file in (directory / FOLDER).glob("*.json")]
        hint = nearest(task, known) if known else ""
        raise InputError(
            f"--schedule task:{task}: not tuned here{hint}; run `anybit schedule tune {directory} --task {task or 'NAME'}`"
        )
    return load(path, directory)


def _chain(spec: str, text: str) -> tuple[int, ...]:
    try:
        return chain_of([int(bits) for bits in text.split(",")])
    except ValueError:
        raise InputError(f"--schedule {spec}: write precisions such as {spec.partition(':')[0]}:4,3") from None
