"""A code term as it is saved, in the kernel's layout and as sums of its rows. NumPy alone, as `tiles.py`.

Weights and activations may have groups of different size: both are then cut into the smaller ones (`common_group`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from anybit.formats.form import Form, groups
from anybit.kernels import native
from anybit.kernels.linear_w_a8 import dual_grained, sparse
from anybit.kernels.linear_w_a8.tiles import COLUMNS, LINE, ROWS, Array, Empty, Tiled, refusal, tile_joined

KINDS = ("affine", "bipolar", "dual_grained")
Saved = Mapping[str, Array]
"""Tensors of a code term by name: `weight`, the planes uint8 [b, N, ceil(K/8)], and its decoder's."""


def common_group(part: Form, columns: int, reach: int) -> int:
    """Columns that share both scales, for activations with one scale for `reach` columns of K."""
    own = columns if part["kind"] == "dual_grained" else min(part["group_size"], columns)
    return min(own, reach, columns)


def nesting_refusal(part: Form, columns: int, reach: int) -> str:
    """Why such a term cannot meet activations with one scale for `reach` columns; empty when it can."""
    own = columns if part["kind"] == "dual_grained" else min(part["group_size"], columns)
    small, large = sorted((own, min(reach, columns)))
    if large < columns and large % small:
        return f"has groups of {own} weights and {reach} activations, which do not nest"
    return refusal(columns, small)


def in_planes(part: Form, columns: int, reach: int | None) -> bool:
    """Whether a dual-grained term stays at its own width; otherwise it is expanded to bytes, for float activations too, which
    have a kernel for scales alone."""
    size = part["group_size"]
    return reach is not None and reach >= columns and (size % COLUMNS == 0 or size >= columns)


def in_pairs(part: Form, columns: int, reach: int | None) -> bool:
    """Whether a 2:4-sparse term is compressed: `linear_w_bf16`, for float activations, reads dense tiles alone."""
    return reach is not None and not sparse.dense_reason(part, columns, common_group(part, columns, reach))


def tile(part: Form, saved: Sequence[Saved], columns: int, reach: int | None, empty: Empty = np.empty) -> Tiled[Array]:
    """Terms of one form that read the same input, one below the other.

    Args:
        part: the term's form, of a kind in `KINDS`.
        saved: of each its tensors.
        columns: K.
        reach: columns per scale of quantized activations, at most K; None when they follow the weight's groups.
        empty: memory for (shape, dtype).

    Raises:
        FormatError: what `tile_joined` refuses, or inner products that no byte holds.
    """
    if part["kind"] == "dual_grained":
        if in_planes(part, columns, reach):
            return dual_grained.tile_planes(saved, part["group_size"], columns, empty)
        expanded = [dual_grained.as_bytes(each, part["group_size"], columns) for each in saved]
        group = min(reach or columns, columns)
        pieces = [(planes, _spread(scale, columns, columns, group), None) for planes, scale, _ in expanded]
        return tile_joined(pieces, group, columns, empty)
    group, own = common_group(part, columns, reach or columns), min(part["group_size"], columns)
    parts = [
        (
            each["weight"],
            _spread(each["scale"], columns, own, group),
            _spread(each["zero"], columns, own, group) if _has_zero(part) else None,
        )
        for each in saved
    ]
    if in_pairs(part, columns, reach):
        return sparse.tile_sparse([(planes, scale) for planes, scale, _ in parts], group, columns, empty)
    tiled = tile_joined(parts, group, columns, empty)
    if part["kind"] == "bipolar":  # 2 c - (2^b - 1) = 2 (c - (2^b - 1) / 2)
        return replace(tiled, scale_mul=2.0, zero_add=(2 ** part["bits"] - 1) / 2)
    return tiled


def row_sums(w: Tiled[Array], reach: int) -> Array:
    """Sums of the weight's rows over every `reach` columns, whole groups: float32 [N, ceil(K/reach)], rounded once.

    A row's sum of codes is its product with ones: the kernel's exact integers.
    """
    _, rows, columns, group, count, _ = w.sizes
    ones = np.zeros((-(-columns // LINE) | 1) * LINE, np.int8)
    ones[:columns] = 1
    counts = np.minimum(columns - np.arange(count) * group, group).astype(np.float32)
    sums = np.empty((1 if w.grain is not None else count, rows), np.int32)
    native.loaded().linear_w_a8_sums(
        *(ones.ctypes.data, 1, w.planes.ctypes.data, w.sizes, sums.ctypes.data),
        *(counts.ctypes.data, *(0 if table is None else table.ctypes.data for table in (w.zero, w.grain, w.mask))),
    )
    steps = sums.T.astype(np.float64)
    if w.grain is None:
        zero = 0.0 if w.zero is None else w.zero_mul * _by_row(_zeros(w.zero), rows)
        steps -= (zero + w.zero_add) * counts
    values = steps * _by_row(w.scale, rows).astype(np.float64) * w.scale_mul
    starts = np.arange(0, values.shape[1], -(-reach // group))
    return np.asarray(np.add.reduceat(values, starts, axis=1).astype(np.float32))


def _by_row(table: Array, rows: int) -> Array:
    """[ceil(N/16), G, 16] as [N, G]."""
    return np.asarray(table.transpose(0, 2, 1).reshape(-1, table.shape[1])[:rows])


def _zeros(packed: Array) -> Array:
    """A byte a row, of nibbles too."""
    return packed if packed.shape[2] == ROWS else np.concatenate([packed & 15, packed >> 4], 2)


def _has_zero(part: Form) -> bool:
    return part["kind"] == "affine" and not part["symmetric"]


def _spread(table: Array, columns: int, own: int, group: int) -> Array:
    """A table [N, G] of groups of `own` columns as one of the finer groups of `group`, each repeating its own's entry."""
    if own == group:
        return table
    count = groups(columns, group)
    return np.ascontiguousarray(np.repeat(table, own // group if own < columns else count, 1)[:, :count])
