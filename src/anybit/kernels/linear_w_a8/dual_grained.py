"""Dual-grained weights (DGQ, QoQ) for the integer kernel: at their own width, or expanded to bytes. Both are exact.

The inner product group_scale * (code - group_zero) is a signed byte, and activations have one scale a token. At its own width
the kernel scales each sum of a group in integers. As bytes the weight is the 8-bit code product + 128, zero 128 and the channel's
scale, one group a row: for group sizes that the kernel does not cut at, and for activations with several scales a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from anybit.errors import FormatError
from anybit.formats.form import row_bytes
from anybit.kernels import native
from anybit.kernels.linear_w_a8.tiles import ROWS, Array, Empty, Tiled, tile_joined, tile_table

_ROWS = 512
"""Rows expanded at a time: a few megabytes of integers, whatever the size of the layer."""


def as_bytes(tensors: Mapping[str, Array], group_size: int, columns: int) -> tuple[Array, Array, None]:
    """Planes uint8 [8, N, ceil(K/8)], scale float16 [N, 1] and no zero (128), as `tile_joined` takes them.

    Args:
        tensors: as they are saved: `weight`, the planes uint8 [b, N, ceil(K/8)], `channel_scale`, `group_scale`, `group_zero`.
        group_size: columns per group.
        columns: K, also the group size of the result.

    Raises:
        FormatError: an integer weight outside int8.
    """
    planes = tensors["weight"]
    out = np.empty((8, planes.shape[1], row_bytes(columns)), np.uint8)
    for rows, product in _products(tensors, group_size, columns):
        out[:, rows] = _packed((product + 128).astype(np.uint8))
    return out, tensors["channel_scale"], None


def tile_planes(
    parts: Sequence[Mapping[str, Array]], group_size: int, columns: int, empty: Empty = np.empty
) -> Tiled[Array]:
    """Dual-grained weights that read the same input, one below the other, at their own width; arguments and errors as `as_bytes`
    and `tile_joined`."""
    for part in parts:
        for _ in _products(part, group_size, columns):  # refuses what no byte holds
            pass
    tables = [(part["weight"], part["group_scale"].astype(np.float16), part["group_zero"]) for part in parts]
    tiled = tile_joined(tables, group_size, columns, empty)
    grain = empty(tiled.scale.shape, np.uint8)
    tile_table(np.concatenate([part["group_scale"] for part in parts]), grain)
    scale = empty((len(grain), 1, ROWS), np.float16)
    tile_table(np.concatenate([part["channel_scale"] for part in parts]), scale)
    return replace(tiled, scale=scale, grain=grain)


def _products(tensors: Mapping[str, Array], group_size: int, columns: int) -> Iterator[tuple[slice, Array]]:
    """Inner products int32, some rows at a time; FormatError for one outside int8."""
    planes = tensors["weight"]
    for start in range(0, planes.shape[1], _ROWS):
        rows = slice(start, start + _ROWS)
        scale, zero = (
            np.repeat(tensors[name][rows].astype(np.int32), group_size, 1)[:, :columns]
            for name in ("group_scale", "group_zero")
        )
        product = scale * (_unpacked(planes[:, rows], columns) - zero)
        if product.min() < -128 or product.max() > 127:
            raise FormatError(f"dual-grained codes reach {product.min()}..{product.max()}, outside int8")
        yield rows, product


def _unpacked(planes: Array, columns: int) -> Array:
    """Planes uint8 [b, N, ceil(K/8)] as codes uint8 [N, K]."""
    planes, codes = np.ascontiguousarray(planes), np.empty((planes.shape[1], columns), np.uint8)
    native.loaded().unpack_planes(planes.ctypes.data, codes.ctypes.data, *planes.shape[:2], columns)
    return codes


def _packed(codes: Array) -> Array:
    """Codes uint8 [N, K] as planes uint8 [8, N, ceil(K/8)]."""
    planes = np.empty((8, len(codes), row_bytes(codes.shape[1])), np.uint8)
    native.loaded().pack_planes(codes.ctypes.data, planes.ctypes.data, 8, *codes.shape)
    return planes
