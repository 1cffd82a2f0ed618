"""Ray: the blocks of one quantization shared among processes, on this machine or a cluster.

    anybit.quantize(model, recipe="gptq-w4", out=directory, block_inputs="float", spread=on_ray(3))

The calling process streams the float model and keeps the account; each task calibrates and quantizes one block. A task whose
process dies is done again by another, with the same bytes. On a cluster every node must see model and output under the same
paths, and have the same version of anybit.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.exceptions import RayError, RayTaskError

from anybit.errors import AnybitError, PromiseError
from anybit.independent import Arguments, Parcel, Spread

AHEAD = 2
"""Blocks under way or waiting, per worker: more would only fill the disk with their inputs."""
RETRIES = 3
"""Times that a block is done again when its process dies."""


def on_ray(workers: int, threads: int | None = None) -> Spread:
    """Blocks on `workers` processes with `threads` each (default: an even share of the cores here).

    The cluster is the one already joined in this process, or that of `RAY_ADDRESS`; where there is neither, one is started here
    and ended with the run.

    Raises (as it runs):
        PromiseError: a block's process died again and again. Otherwise what quantizing the block raised.
    """
    cores = threads or max(1, len(os.sched_getaffinity(0)) // workers)

    def spread(parcel: Parcel, due: Iterator[tuple[int, Arguments]]) -> Iterator[int]:
        with _cluster(workers * cores):
            task = ray.remote(num_cpus=cores, max_retries=RETRIES)(_quantize_block)
            shared = ray.put(parcel)
            under_way: dict[ray.ObjectRef[None], int] = {}
            for index, arguments in due:
                under_way[task.remote(shared, index, arguments, cores)] = index
                if len(under_way) >= AHEAD * workers:
                    yield _next(under_way)
            while under_way:
                yield _next(under_way)

    return spread


def _quantize_block(parcel: Parcel, index: int, arguments: Arguments, threads: int) -> None:
    parcel.quantize(index, arguments, threads)


def _next(under_way: dict[ray.ObjectRef[None], int]) -> int:
    """Wait for a block and take it off the list."""
    done = ray.wait(list(under_way), num_returns=1)[0][0]
    index = under_way.pop(done)
    try:
        ray.get(done)
    except RayTaskError as error:
        if isinstance(error.cause, AnybitError):
            raise error.cause from None
        raise
    except RayError as error:
        raise PromiseError(
            f"block {index}: its process died {RETRIES + 1} times ({type(error).__name__}), most often for want of memory; "
            "give fewer --workers, then go on with --resume"
        ) from error
    return index


@contextmanager
def _cluster(cores: int) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    else:
        ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()
