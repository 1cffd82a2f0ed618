"""All tasks by name."""

from __future__ import annotations

from anybit.errors import InputError, nearest
from anybit.evaluate.tasks import hub, local
from anybit.evaluate.tasks.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (*local.TASKS, *hub.TASKS)}


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        InputError: there is none.
    """
    if name not in TASKS:
        raise InputError(f"no task '{name}'{nearest(name, TASKS)}")
    return TASKS[name]
