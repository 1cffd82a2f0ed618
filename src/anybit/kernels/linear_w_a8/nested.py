"""Nested affine weights for the integer kernel: one set of tiled planes, a pair of tables for every tabled width.

The first p of b planes hold the code c >> (b - p), whose middle is 2^(b-p) c_p + (2^(b-p) - 1) / 2: the kernel's three factors
say so, and its zero then lies between codes. Such a zero is exact in float32, integer sums are what they always are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from anybit.formats.form import RATIO_ONE, Form
from anybit.kernels.linear_w_a8.tiles import ROWS, Array, Empty, Tiled, tile_joined, tile_table


def tile_nested(
    parts: Sequence[Mapping[str, Array]], form: Form, columns: int, empty: Empty = np.empty
) -> dict[int, Tiled[Array]]:
    """Every readable width of weights that read the same input, one below the other; planes are shared, tables by those widths
    that share them on disk.

    Args:
        parts: of each the tensors as saved: `weight`, the planes uint8 [b, N, ceil(K/8)], `scale`, `zero{t}`, `ratio{t}`.
        form: of their one term.
        columns: K.
        empty: memory for (shape, dtype).

    Raises:
        FormatError: what `tile_joined` refuses.
    """
    stored = form["bits"]
    whole = tile_joined([(part["weight"], part["scale"], None) for part in parts], form["group_size"], columns, empty)
    tables = {}
    for table in form["tables"]:
        scale = whole.scale
        if table != stored:
            scale = _tiled(np.concatenate([_scale(part, table) for part in parts]), empty)
        tables[table] = (scale, _tiled(np.concatenate([part[f"zero{table}"] for part in parts]), empty))
    views = {}
    for bits in form["precisions"]:
        scale, zero = tables[min(table for table in tables if table >= bits)]
        step = 2.0 ** (stored - bits)
        add = -(1 - 1 / step) / 2
        views[bits] = replace(whole, bits=bits, scale=scale, zero=zero, scale_mul=step, zero_mul=1 / step, zero_add=add)
    return views


def _scale(part: Mapping[str, Array], table: int) -> Array:
    """Scales float16 [N, G] of a tabled width: the product of two numbers that float32 holds, rounded once."""
    ratio = part[f"ratio{table}"].astype(np.float32)
    return (part["scale"].astype(np.float32) * ratio / RATIO_ONE).astype(np.float16)


def _tiled(table: Array, empty: Empty) -> Array:
    """[N, G] as [ceil(N/16), G, 16]; zeros take a byte each whatever the width: they count steps of the stored codes."""
    tiled = empty((-(-len(table) // ROWS), table.shape[1], ROWS), table.dtype)
    tile_table(table, tiled)
    return tiled
