"""What a quantized layer multiplies besides its codes, in the layout of `linear_side`. NumPy alone: an engine starts without
PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
ROWS = 16


@dataclass(frozen=True)
class Side:
    """Blocks of 16 rows; rows beyond N are 0.

    Attributes:
        sums: float32 [ceil(N/16), G, 16], or None: activations without offsets.
        columns: float16 [ceil(N/16), F, 16], or None: no column stays in float.
        rows: N.
    """

    sums: Array | None
    columns: Array | None
    rows: int

    @property
    def width(self) -> int:
        """G + F, floats of a token's side."""
        return sum(self.counts)

    @property
    def counts(self) -> tuple[int, int]:
        """G and F."""
        groups = 0 if self.sums is None else int(self.sums.shape[1])
        return groups, 0 if self.columns is None else int(self.columns.shape[1])

    @property
    def pointers(self) -> tuple[int, int, int, int]:
        """Addresses, each with its count, as the native module takes them."""
        groups, width = self.counts
        return _address(self.sums), groups, _address(self.columns), width


def tile_side(sums: Array | None, columns: Array | None) -> Side | None:
    """Row sums float32 [N, G] and float columns float16 [N, F] as one side; None when there is neither."""
    found = [table for table in (sums, columns) if table is not None]
    if not found:
        return None
    tiled = [None if table is None else _tiled(table) for table in (sums, columns)]
    return Side(tiled[0], tiled[1], len(found[0]))


def _tiled(table: Array) -> Array:
    rows, count = table.shape
    padded = np.zeros((-(-rows // ROWS) * ROWS, count), table.dtype)
    padded[:rows] = table
    return np.ascontiguousarray(padded.reshape(-1, ROWS, count).transpose(0, 2, 1))


def _address(array: Array | None) -> int:
    return 0 if array is None else int(array.ctypes.data)
