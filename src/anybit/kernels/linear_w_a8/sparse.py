"""2:4-sparse weights for the integer kernel: two codes of every four columns, and a mask that says where they stand. Exact.

The kernel puts the zeros back in registers, so that all its ways of multiplying, and their results to the bit, are those of the
dense tiles. It reads b / 2 + 1 bits a weight instead of b. NumPy alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np

from anybit.errors import FormatError
from anybit.formats.form import row_bytes
from anybit.kernels import native
from anybit.kernels.linear_w_a8.tiles import COLUMNS, LINE, ROWS, Array, Empty, Tiled, refusal, tile_joined

Parts = Sequence[tuple[Array, Array]]
NARROW = 1024
"""Columns below which a layer stays dense. Compressed tiles pay where weights come from memory, NOTES.md has the measurements."""


def dense_reason(part: Mapping[str, Any], columns: int, group_size: int) -> str:
    """Why a term stays dense in the kernel here, where `group_size` columns share both scales; empty where it is compressed."""
    if not part.get("sparsity"):
        return "is not sparse"
    if native.loaded().isa() == "scalar":
        return "would spend more on putting zeros back than on reading them, without vectors"
    if columns < NARROW:
        return f"has {columns} columns, fewer than {NARROW}: such a model lives near the caches, where reading less gains nothing"
    if part["bits"] < 3:
        return f"has {part['bits']} bits: two codes and their places take as much"
    if group_size % (2 * COLUMNS) and group_size < columns:
        return f"has groups of {group_size} columns, not of whole {2 * COLUMNS}"
    return ""


def tile_sparse(parts: Parts, group_size: int, columns: int, empty: Empty = np.empty) -> Tiled[Array]:
    """2:4-sparse symmetric weights that read the same input, one below the other, as compressed tiles.

    Args:
        parts: of each, planes uint8 [b, N, ceil(K/8)], b from 2, and scale float16 [N, G].
        group_size: columns per scale, a multiple of 64 or at least K.
        columns: K.
        empty: memory for (shape, dtype).

    Raises:
        FormatError: what `tiles.tile_joined` refuses, other groups, or more than two values in four columns.
    """
    if reason := refusal(columns, group_size):
        raise FormatError(reason)
    if group_size % (2 * COLUMNS) and group_size < columns:
        raise FormatError(f"group_size {group_size} of a 2:4-sparse weight is no multiple of {2 * COLUMNS}")
    found = [compress(planes, columns) for planes, _ in parts]
    half = -(-columns // 4) * 2
    kept = [(planes, scale, None) for (planes, _), (_, scale) in zip(found, parts, strict=True)]
    tiled = tile_joined(kept, min(group_size // 2, half) if group_size < columns else half, half, empty)
    mask = tile_mask(np.concatenate([mask for _, mask in found]), columns, empty)
    return replace(tiled, columns=columns, group_size=group_size, mask=mask)


def compress(planes: Array, columns: int) -> tuple[Array, Array]:
    """Two codes of every four columns, and which ones they are.

    Args:
        planes: uint8 [b, N, ceil(K/8)] of symmetric codes, whose zero is 2^(b-1).
        columns: K.

    Returns:
        Planes uint8 [b, N, ceil(K/16)] of the kept codes, two's complement around that zero, and bits uint8 [N, ceil(K/8)], two
        of every four: where fewer are no zero, the first others are kept too. `reference.decompress` is the inverse.

    Raises:
        FormatError: more than two values in four columns.
    """
    filled = ~planes[0]
    for plane in planes[1:]:
        filled |= plane
    if columns % 8:
        filled[:, -1] &= (1 << columns % 8) - 1
    mask = _completed()[filled]
    if not mask.all():
        raise FormatError("a weight that says 2:4 has more than two values in four columns; quantize it again")
    kept = np.zeros((*planes.shape[:2], row_bytes(-(-columns // 4) * 2)), np.uint8)
    for i, plane in enumerate(planes):
        pairs = _picked()[mask, plane if i else ~plane]
        kept[i] = pairs[:, ::2]
        kept[i, :, : pairs.shape[1] // 2] |= pairs[:, 1::2] << 4
    return kept, mask


def tile_mask(mask: Array, columns: int, empty: Empty = np.empty) -> Array:
    """Bits uint8 [N, ceil(K/8)] as lines uint8 [ceil(N/16), ceil(K/32), 64]: four bytes a row; 0 beyond the weight."""
    rows, width = mask.shape
    blocks, chunks = -(-rows // ROWS), -(-columns // COLUMNS)
    padded = np.zeros((blocks * ROWS, chunks * 4), np.uint8)
    padded[:rows, :width] = mask
    lines = empty((blocks, chunks, LINE), np.uint8)
    lines.reshape(blocks, chunks, ROWS, 4)[...] = padded.reshape(blocks, ROWS, chunks, 4).transpose(0, 2, 1, 3)
    return lines


@cache
def _completed() -> Array:
    """uint8 [256]: two columns of four for either nibble, with the first others where fewer are given; 0 where more are."""
    half = np.zeros(16, np.uint8)
    for nibble in range(16):
        others = [column for column in range(4) if not nibble >> column & 1]
        half[nibble] = nibble | sum(1 << column for column in others[: max(0, len(others) - 2)])
    half[[7, 11, 13, 14, 15]] = 0
    return ((half[:, None] << 4 | half) * (half[:, None] > 0) * (half > 0)).reshape(256)


@cache
def _picked() -> Array:
    """uint8 [256, 256]: by mask and plane, the bits of the columns kept, two of the low nibble and then two of the high one."""
    half = np.zeros((16, 16), np.uint8)
    for mask, plane in product(range(16), repeat=2):
        kept = [column for column in range(4) if mask >> column & 1][:2]
        half[mask, plane] = sum((plane >> column & 1) << i for i, column in enumerate(kept))
    return (half[:, None, :, None] << 2 | half[None, :, None, :]).reshape(256, 256)
