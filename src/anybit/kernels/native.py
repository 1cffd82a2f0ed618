"""The compiled module `anybit._native`, or nothing: the one place that loads it.

A build without it still works, on the PyTorch references, and says so once. `ANYBIT_ISA=scalar|avx2|avx512` forces an
instruction set, `ANYBIT_THREADS=n` the threads.
"""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType
from typing import TYPE_CHECKING

from anybit.errors import KernelUnavailable

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("anybit")


@functools.cache
def native() -> ModuleType | None:
    """`anybit._native`, or None (with one warning) when it was not built.

    Raises:
        KernelUnavailable: ANYBIT_ISA or ANYBIT_THREADS asks for something this machine does not have.
    """
    try:
        module = importlib.import_module("anybit._native")
    except ModuleNotFoundError:
        log.warning(
            "anybit._native is not built: slow PyTorch kernels run instead (fix: pip install . with a C++ compiler)"
        )
        return None
    try:
        module.isa(), module.threads()
    except ValueError as error:
        raise KernelUnavailable(str(error)) from None
    return module


def loaded() -> ModuleType:
    """The module, for callers that have already asked `refusal`."""
    module = native()
    if module is None:
        raise KernelUnavailable("anybit._native is not built; install anybit with a C++ compiler")
    return module


def refusal(*tensors: Tensor | None) -> str:
    """Why native kernels cannot run on these tensors; empty when they can."""
    if native() is None:
        return "anybit._native is not built; install anybit with a C++ compiler"
    for tensor in tensors:
        if tensor is not None and not tensor.is_cpu:
            return f"it needs CPU tensors, got {tensor.device.type}"
    return ""


def isa() -> str:
    """The instruction set in use: avx512, avx2 or scalar; `none` when nothing native is built."""
    module = native()
    return str(module.isa()) if module else "none"


def set_threads(count: int) -> None:
    """Threads of the native kernels, 1..256; does nothing when nothing native is built."""
    module = native()
    if module:
        module.set_threads(count)


@functools.cache
def say_once(message: str) -> None:
    """Log a warning the first time it comes up."""
    log.warning(message)
