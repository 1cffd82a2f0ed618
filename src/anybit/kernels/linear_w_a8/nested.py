"""Nested affine weights for the integer kernel: one set of tiled planes, a pair of tables for every tabled width.

The first p of b planes hold the code c >> (b - p), whose middle is 2^(b-p) c_p + (2^(b-p) - 1) / 2: the kernel's three factors
say so, and its zero then lies between codes. Such a zero is exact in float32, integer sums are what they always are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from anybit.errors import FormatError
from anybit.formats.nested_affine import NestedAffine
from anybit.kernels.linear_w_a8.op import ROWS, Empty, Tiled, tile_joined, tile_table


def tile_nested(
    parts: Sequence[tuple[Tensor, NestedAffine]], columns: int, empty: Empty | None = None
) -> dict[int, Tiled]:
    """Every readable width of weights that read the same input, one below the other; planes are shared, tables by those widths
    that share them on disk.

    Args:
        parts: (planes uint8 [b, N, ceil(K/8)], decoder) of each; decoders differ in their tensors alone.
        columns: K.
        empty: memory for (shape, dtype); default: `torch.empty`.

    Raises:
        FormatError: weights of different widths or groups, or what `tile` refuses.
    """
    first = parts[0][1]
    if any(decoder.form() != first.form() for _, decoder in parts):
        raise FormatError("nested weights of different widths, groups or tables cannot be joined")
    allocate = empty or (lambda shape, dtype: torch.empty(shape, dtype=dtype))
    whole = tile_joined(
        [(planes, decoder.scale, None) for planes, decoder in parts], first.group_size, columns, allocate
    )
    tables = {}
    for table in first.zeros:
        grids = [decoder.grid(table) for _, decoder in parts]
        scale = whole.scale
        if table != first.bits:
            scale = _tiled(torch.cat([scale for scale, _ in grids]), allocate)
        tables[table] = (scale, _tiled(torch.cat([zero for _, zero in grids]), allocate))
    views = {}
    for bits in first.precisions:
        scale, zero = tables[min(table for table in tables if table >= bits)]
        step = 2.0 ** (first.bits - bits)
        add = -(1 - 1 / step) / 2
        views[bits] = replace(whole, bits=bits, scale=scale, zero=zero, scale_mul=step, zero_mul=1 / step, zero_add=add)
    return views


def _tiled(table: Tensor, allocate: Empty) -> Tensor:
    """[N, G] as [ceil(N/16), G, 16]; zeros take a byte each whatever the width: they count steps of the stored codes."""
    tiled = allocate((-(-len(table) // ROWS), table.shape[1], ROWS), table.dtype)
    tile_table(table, tiled)
    return tiled
