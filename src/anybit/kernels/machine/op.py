"""What this machine can do at most, measured now: memory-read bandwidth and multiply-add peaks.

Every "% of peak" divides by these, taken in the same run: neighbours on the machine change them by half within minutes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from anybit.kernels import native

_STEPS = 1 << 16
_PEAKS = ("int8_vector", "int8_tiles", "bf16_tiles")  # the order of `Peak` in cpu.h
_TILE_PEAKS = _PEAKS[1:]


@dataclass(frozen=True)
class Peaks:
    """Limits of this machine with the threads in use; 0.0 for what it does not have.

    Attributes:
        read_bytes: bytes a second that all threads together read from memory.
        read_buffer: bytes of the buffer that was read.
        int8_vector: u8 x s8 operations a second in vector registers (VPDPBUSD; VPMADDUBSW on AVX2), 2 per multiply-add.
        int8_tiles, bf16_tiles: the same of the AMX tile multiplier.
    """

    read_bytes: float
    read_buffer: int
    int8_vector: float
    int8_tiles: float
    bf16_tiles: float

    @property
    def int8(self) -> float:
        """The higher int8 peak: what a matrix product is held against."""
        return max(self.int8_vector, self.int8_tiles)


def read_bandwidth(buffer: torch.Tensor) -> float:
    """Bytes a second of one pass over `buffer`, uint8 [n], n a multiple of 1 MiB, with the threads in use.

    Raises:
        KernelUnavailable: nothing native is built.
    """
    if buffer.dtype != torch.uint8 or buffer.ndim != 1 or not buffer.is_contiguous() or len(buffer) % (1 << 20):
        raise ValueError(f"buffer must be uint8 [n], n a multiple of 1 MiB; got {buffer.dtype} {list(buffer.shape)}")
    return len(buffer) / native.loaded().seconds_to_read(buffer.data_ptr(), len(buffer))


def multiply_add_peak(name: str, steps: int = _STEPS) -> float:
    """Operations a second (2 per multiply-add) of `int8_vector`, `int8_tiles` or `bf16_tiles`; 0.0 where there is none."""
    return 2.0 * native.loaded().multiply_adds_per_second(_PEAKS.index(name), steps)


def measure_peaks(buffer: torch.Tensor, rounds: int = 3) -> Peaks:
    """The best of `rounds` of each limit; `buffer`, as for `read_bandwidth`, must be much larger than the cache."""
    best = dict.fromkeys(("read", *_PEAKS), 0.0)
    for _ in range(rounds):
        best["read"] = max(best["read"], read_bandwidth(buffer))
        for name in _PEAKS:
            steps = _STEPS // 16 if name in _TILE_PEAKS else _STEPS
            best[name] = max(best[name], multiply_add_peak(name, steps))
    return Peaks(best.pop("read"), len(buffer), **best)
