"""Weights in the layout of `linear_w_a8`, made once from the saved planes. NumPy alone: an engine starts without PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from anybit.errors import FormatError
from anybit.formats.form import groups, row_bytes
from anybit.kernels import native

ROWS, COLUMNS, LINE = 16, 32, 64
MAX_COLUMNS = (2**31 - 1) // (127 * 255)
"""Columns that one int32 sum can hold, 66,311: 127 * 255 * K < 2^31."""

Array = NDArray[Any]
Parts = Sequence[tuple[Array, Array, Array | None]]
Empty = Callable[[tuple[int, ...], Any], Array]
A = TypeVar("A")


@dataclass(frozen=True)
class Tiled(Generic[A]):
    """A weight [N, K] in the kernel's layout: scale_mul scale (code - (zero_mul zero + zero_add)), or dual-grained, scale (grain
    (code - zero)). A is the type of arrays: PyTorch's for `op.py`, NumPy's for the engine.

    Attributes:
        planes: uint8 [b, ceil(N/16), ceil(K/32), 64], most significant plane first.
        scale: float16 [ceil(N/16), G, 16]; rows beyond N are 0. Dual-grained: [ceil(N/16), 1, 16].
        zero: uint8 [ceil(N/16), G, 16], or [ceil(N/16), G, 8] for stored codes of up to 4 bits (row r in the low nibble
            of byte r, row r + 8 in the high one), or None: `zero_add` alone.
        bits: planes in use, 1..b.
        rows, columns: N, K.
        group_size: columns per scale; a multiple of 32, or K.
        scale_mul, zero_mul, zero_add: factors that turn the stored grid into the one in use.
        grain: uint8 [ceil(N/16), G, 16] of a dual-grained weight: its groups are scaled in integers.
        mask: uint8 [ceil(N/16), ceil(K/32), 64] of a 2:4-sparse weight, whose planes hold kept columns alone (`sparse.py`):
            [b, ceil(N/16), ceil(K/64), 64].
    """

    planes: A
    scale: A
    zero: A | None
    bits: int
    rows: int
    columns: int
    group_size: int
    scale_mul: float
    zero_mul: float
    zero_add: float
    grain: A | None = None
    mask: A | None = None

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """bits, N, K, group_size, G, bytes of a group's zeros: as the native module takes them."""
        zero: Any = self.zero
        zero_bytes = 0 if zero is None else int(zero.shape[2])
        count = groups(self.columns, self.group_size)
        return self.bits, self.rows, self.columns, self.group_size, count, zero_bytes

    @property
    def factors(self) -> tuple[float, float, float]:
        """scale_mul, zero_mul, zero_add."""
        return self.scale_mul, self.zero_mul, self.zero_add


def refusal(columns: int, group_size: int) -> str:
    """Why a weight of this shape cannot run here; empty when it can."""
    if group_size % COLUMNS and group_size < columns:
        return f"group_size {group_size} is neither a multiple of {COLUMNS} nor the whole row of {columns}"
    if min(group_size, columns) > MAX_COLUMNS:
        return f"{columns} columns in one group could overflow a 32-bit sum (at most {MAX_COLUMNS})"
    return ""


def tile_joined(parts: Parts, group_size: int, columns: int, empty: Empty = np.empty) -> Tiled[Array]:
    """Affine weights that read the same input, one below the other, as tiles.

    Args:
        parts: of each, planes uint8 [b, N, ceil(K/8)], scale float16 [N, G], zero uint8 [N, G] or None (2^(b-1)).
        group_size: columns per scale.
        columns: K.
        empty: memory for (shape, dtype).

    Raises:
        FormatError: shapes or dtypes that do not fit together, or a shape that `refusal` names.
    """
    if len(parts) > 1 and any(planes.shape[1] % ROWS for planes, _, _ in parts[:-1]):
        return tile_joined([_concatenated(parts)], group_size, columns, empty)
    if reason := refusal(columns, group_size):
        raise FormatError(reason)
    bits, count = len(parts[0][0]), groups(columns, group_size)
    rows, blocks = sum(planes.shape[1] for planes, _, _ in parts), sum(_blocks(planes) for planes, _, _ in parts)
    tiles = empty((bits, blocks, -(-columns // COLUMNS), LINE), np.uint8)
    table = empty((blocks, count, ROWS), np.float16)
    zeros = None if parts[0][2] is None else empty((blocks, count, ROWS // 2 if bits <= 4 else ROWS), np.uint8)
    block = 0
    for planes, scale, zero in parts:
        _check_part(planes, scale, zero, count, columns)
        if len(planes) != bits or (zero is None) != (zeros is None):
            raise FormatError("weights of different widths or symmetry cannot be joined")
        end = block + _blocks(planes)
        _tile_planes(planes, tiles[:, block:end], columns)
        tile_table(scale, table[block:end])
        if zero is not None and zeros is not None:
            _tile_zeros(zero, zeros[block:end])
        block = end
    middle = 0.0 if zeros is not None else float(2 ** (bits - 1))
    return Tiled(tiles, table, zeros, bits, rows, columns, group_size, 1.0, 1.0, middle)


def _check_part(planes: Array, scale: Array, zero: Array | None, count: int, columns: int) -> None:
    if planes.ndim != 3 or planes.dtype != np.uint8 or planes.shape[2] != row_bytes(columns):
        raise FormatError(
            f"planes must be uint8 [b, N, {row_bytes(columns)}] for {columns} columns, got {planes.dtype} {planes.shape}"
        )
    table = (planes.shape[1], count)
    if scale.shape != table or scale.dtype != np.float16:
        raise FormatError(f"scale must be float16 {table}, got {scale.dtype} {scale.shape}")
    if zero is not None and (zero.shape != table or zero.dtype != np.uint8):
        raise FormatError(f"zero must be uint8 {table}, got {zero.dtype} {zero.shape}")


def _concatenated(parts: Parts) -> tuple[Array, Array, Array | None]:
    planes, scales, zeros = zip(*parts, strict=True)
    return np.concatenate(planes, 1), np.concatenate(scales), None if zeros[0] is None else np.concatenate(zeros)


def _blocks(planes: Array) -> int:
    return int(-(-planes.shape[1] // ROWS))


def _tile_planes(planes: Array, tiles: Array, columns: int) -> None:
    """Planes [b, N, bytes] into tiles [b, blocks, chunks, 64], which may be a stretch of a larger weight's blocks."""
    for plane, lines in zip(np.ascontiguousarray(planes), tiles, strict=True):
        native.loaded().tile_planes(plane.ctypes.data, lines.ctypes.data, 1, len(plane), columns)


def tile_table(table: Array, tiled: Array) -> None:
    """[N, G] to [ceil(N/16), G, 16], missing rows 0."""
    rows, count = table.shape
    table = np.ascontiguousarray(table)
    native.loaded().tile_table(table.ctypes.data, rows, count, table.itemsize, tiled.ctypes.data)


def _tile_zeros(zero: Array, tiled: Array) -> None:
    """Zeros [N, G] to [ceil(N/16), G, 16 or 8]: a byte or a nibble each."""
    if tiled.shape[2] == ROWS:
        return tile_table(zero, tiled)
    whole = np.empty((*tiled.shape[:2], ROWS), np.uint8)
    tile_table(zero, whole)
    np.bitwise_or(whole[..., :8], whole[..., 8:] << 4, out=tiled)
    return None
