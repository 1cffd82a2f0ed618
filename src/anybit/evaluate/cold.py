"""Memory that is not in the cache: bandwidth is only seen on more bytes than the cache holds."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from anybit.engine.memory import Memory

_GIB = 1 << 30


def read_buffer() -> torch.Tensor:
    """Memory to read: three times the last-level cache, at least 1 GiB, at most a quarter of what is free.

    In huge pages where the system gives them (a third faster), and written once, so that every page is really there
    (untouched pages are all the same page of zeros).
    """
    wanted = max(3 * last_level_cache(), _GIB)
    size = max(1 << 20, min(wanted, free_memory() // 4) >> 20 << 20)
    return torch.from_numpy(Memory().take((size,), np.uint8)).fill_(1)


def beyond_cache(size: int) -> bool:
    """Whether `size` bytes are at least twice the last-level cache; if not, part of a second pass comes from there."""
    return size >= 2 * last_level_cache()


def last_level_cache() -> int:
    """Bytes of the largest cache that /sys reports for the first core; 32 MiB where it reports none.

    A virtual machine may report its host's whole cache, of which it gets a share: then the buffer is larger than needed.
    """
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1], 0))
    return max(sizes, default=32 << 20)


def free_memory() -> int:
    """Bytes that can be had without swapping."""
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
