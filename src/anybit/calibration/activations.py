"""Hidden states between blocks, on disk: they are the largest thing calibration keeps, and resuming needs them
anyway."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor


class Activations:
    """`samples` records of float32 [T, H] in one file of raw little-endian numbers.

    Read and written with plain file calls, so memory holds only the records in use; the page cache keeps the rest fast.
    """

    def __init__(self, path: Path, samples: int, tokens: int, hidden: int) -> None:
        self.path, self.samples, self.shape = path, samples, (tokens, hidden)
        self._bytes = tokens * hidden * 4

    def read(self, sample: int) -> Tensor:
        """Record `sample` as float32 [1, T, H]."""
        buffer = bytearray(self._bytes)
        with self.path.open("rb") as file:
            file.seek(sample * self._bytes)
            if file.readinto(buffer) != self._bytes:
                raise OSError(f"{self.path} is shorter than its {self.samples} records")
        return torch.frombuffer(buffer, dtype=torch.float32).view(1, *self.shape)

    def write(self, sample: int, hidden: Tensor) -> None:
        """Store float32 [1, T, H] as record `sample`; records may come in any order and from several threads."""
        data = hidden.contiguous().view(-1).numpy().tobytes()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(descriptor, data, sample * self._bytes)
        finally:
            os.close(descriptor)

    def sync(self) -> None:
        """Return once the records are on the disk itself."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
