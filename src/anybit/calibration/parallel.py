"""Work on several cores whose results do not depend on how many there are.

Threaded matrix products add up in an order that follows the thread count, so quantized bytes would too. Here every
task runs on one thread, tasks are cut the same way whatever the machine, and results are combined in task order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """A pool of `threads` threads, each with single-threaded, gradient-free torch."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads, initializer=_single_threaded)

    def map(self, task: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """`[task(item) for item in items]`; the first exception is raised after running tasks have ended."""
        return list(self._pool.map(task, items))

    def close(self) -> None:
        """Wait for running tasks, drop waiting ones."""
        self._pool.shutdown(cancel_futures=True)


@contextmanager
def workers(threads: int | None = None) -> Iterator[Workers]:
    """A pool of `threads` (default: the cores this process may use) while the calling thread too is single-threaded."""
    before, grad = torch.get_num_threads(), torch.is_grad_enabled()
    pool = Workers(threads or len(os.sched_getaffinity(0)))
    _single_threaded()
    try:
        yield pool
    finally:
        pool.close()
        torch.set_num_threads(before)
        torch.set_grad_enabled(grad)


def _single_threaded() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
