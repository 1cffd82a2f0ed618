"""Our threads on the processors that vLLM gave this worker.

vLLM hands them to OpenMP in the environment, and OpenMP then ties the calling thread to one of them; our own pool, started from
that thread, would have to share it.
"""

from __future__ import annotations

import functools
import os
import re

from anybit.kernels import native

BINDINGS = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES")


@functools.cache
def use_given_cores() -> None:
    """Start the pool with one thread for each processor of the binding; without a binding, or where ANYBIT_THREADS is set,
    nothing changes."""
    cores = bound_cores(os.environ)
    if not cores or "ANYBIT_THREADS" in os.environ or not hasattr(os, "sched_setaffinity"):
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # threads inherit it
    native.set_threads(len(cores))
    os.sched_setaffinity(0, before)


def bound_cores(environment: os._Environ[str] | dict[str, str]) -> set[int]:
    """Processors of the first OpenMP binding that is set, in the forms that vLLM writes; empty without one."""
    text = next((environment[key] for key in BINDINGS if environment.get(key)), "")
    lists = re.findall(r"proclist=\[([\d,]+)\]|\{([\d,]+)\}|^([\d ]+)$", text)
    return {int(core) for found in lists for core in re.findall(r"\d+", " ".join(found))}
