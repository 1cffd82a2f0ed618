"""lm-eval: checkpoints as the model `anybit` of EleutherAI's harness, and local tasks that need no network.

    lm_eval.simple_evaluate(model="anybit", model_args={"pretrained": directory, "precision": 4}, tasks=[...])
    python -m anybit.integrations.lm_eval run --model anybit --model_args pretrained=DIR --device cpu --tasks wiki-cloze

The harness finds no models by itself, so this module has to be imported first; run as a program it is the harness's own
command line with `anybit` registered.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from anybit.errors import InputError, nearest
from anybit.loading import load_any

TASKS = Path(__file__).with_name("tasks")
"""Tasks that come along: YAML, with their texts made by `tasks/documents.py`."""


@register_model("anybit")
class AnybitLM(HFLM):
    """A checkpoint with its files and canary checked, or any model that `load_any` takes, on the CPU."""

    def __init__(
        self,
        pretrained: str,
        precision: int | None = None,
        dtype: str = "float32",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
    ) -> None:
        """`precision`: bits to read nested weights with, default all; the rest is the harness's own. Errors of `load_any`."""
        if device not in (None, "cpu"):
            raise InputError(f"device {device}: this version evaluates on the CPU; give --device cpu")
        model, tokenizer = load_any(pretrained, dtype=dtype, precision=precision)
        sizes = {"batch_size": batch_size, "max_batch_size": max_batch_size, "max_length": max_length}
        super().__init__(model, tokenizer=tokenizer, add_bos_token=add_bos_token, **sizes)


def score(
    model: str | Path,
    tasks: Sequence[str],
    *,
    task_path: str | Path | None = None,
    precision: int | None = None,
    dtype: str = "float32",
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """Metrics by task: {"wiki-cloze": {"acc": 0.5, "acc_stderr": 0.03, ...}}.

    Args:
        model: what `load_any` takes.
        tasks: names of those that come along (`TASKS`), of YAML files under `task_path`, or of the harness.
        task_path: a folder of YAML tasks. Python files that they name with `!function` are run.
        precision: bits to read nested weights with; default: all that are stored.
        dtype: of the floating-point parts.
        limit: score so many documents of each task; None: all.

    Raises:
        InputError: a task that is not known, or what `load_any` raises.
    """
    manager = find_tasks(tasks, task_path)
    subject = AnybitLM(str(model), precision=precision, dtype=dtype)
    found = lm_eval.simple_evaluate(subject, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False)
    return {task: _metrics(row) for task, row in found["results"].items()}


def find_tasks(tasks: Sequence[str], task_path: str | Path | None = None) -> TaskManager:
    """A manager that knows every one of `tasks`; the harness's thousands are read only when they are needed.

    Raises:
        InputError: one is not known, or `task_path` is no directory.
    """
    if task_path is not None and not Path(task_path).is_dir():
        raise InputError(f"--task-path {task_path}: no such directory; give a folder of lm-eval's YAML tasks")
    folders = [str(path) for path in (TASKS, task_path) if path is not None]
    local = TaskManager(include_path=folders, include_defaults=False)
    if set(tasks) <= set(local.all_tasks):
        return local
    every = TaskManager(include_path=folders)
    for task in tasks:
        if task not in every.all_tasks:
            raise InputError(f"no task '{task}' here or in lm-eval{nearest(task, local.all_tasks)}")
    return every


def _metrics(row: dict[str, Any]) -> dict[str, float]:
    """Numbers of one task: `acc,none` is the metric `acc` without a filter; how many documents there were."""
    named = {"documents" if key == "sample_len" else key.removesuffix(",none"): value for key, value in row.items()}
    return {key: value for key, value in named.items() if isinstance(value, int | float)}


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
