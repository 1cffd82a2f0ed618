"""The simple block types of GGUF: 32 columns, one float16 scale d, and for Q4_1 a float16 minimum m.

    Q4_0  d * (q - 8)     2 bytes of d, then 16: byte j holds code j low and code j + 16 high
    Q4_1  d * q + m       2 bytes of d, 2 of m, then 16 as above
    Q5_0  d * (q - 16)    2 bytes of d, 4 of fifth bits (bit j: code j), then 16 as above
    Q5_1  d * q + m       2 bytes of d, 2 of m, then as Q5_0
    Q8_0  d * q           2 bytes of d, then 32 int8

`pack_*` take a `Grid` and give uint8 [N, bytes of a row], or None where the type cannot say it exactly; `Unpacked` is the way
back. All of it is NumPy over whole rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anybit.integrations.exchange.grid import Grid

BLOCK = 32
Bytes = NDArray[Any]
"""uint8; NumPy's annotations lose the type in every shift."""


@dataclass(frozen=True)
class Unpacked:
    """What the bytes of a row of blocks say; B blocks of `columns` columns, G groups.

    Attributes:
        codes: uint8 [N, K].
        scale: float16 [N, B].
        step: int8 [N, G] that multiplies the scale, or None.
        offset, offset_step: float16 [N, B] and int8 [N, G], subtracted; or None.
    """

    codes: Tensor
    scale: Tensor
    step: Tensor | None = None
    offset: Tensor | None = None
    offset_step: Tensor | None = None


def in_blocks(grid: Grid, size: int) -> Grid | None:
    """`grid` in groups of `size`; None where its groups do not fall on that, or scales are beyond float16."""
    columns = grid.codes.shape[1]
    if columns % size or (grid.group_size % size and grid.group_size < columns):
        return None
    found = grid.in_groups(size)
    return found if torch.equal(found.scale.half().float(), found.scale) else None


def around(grid: Grid, size: int, middle: int) -> tuple[Bytes, Bytes] | None:
    """(scales, codes) of value = scale * (code - middle) with 0 <= code < 2 middle: the bytes of a float16 [N, B, 2] per block
    of `size` columns, and uint8 [N, K]; None where the grid is not that."""
    cut = in_blocks(grid, size)
    if cut is None or not torch.equal(cut.zero.round(), cut.zero):
        return None
    found = cut.codes.short() - cut.zero.short().repeat_interleave(size, 1) + middle
    if int(found.min()) < 0 or int(found.max()) >= 2 * middle:
        return None
    return halves(cut.scale), found.numpy().astype(np.uint8)


def pack_q4_0(grid: Grid) -> Bytes | None:
    """See above."""
    found = around(grid, BLOCK, 8)
    return None if found is None else _rows([found[0], _nibbles(found[1])])


def pack_q4_1(grid: Grid, rounded: bool = False) -> Bytes | None:
    """See above; with `rounded` the minimum may be the nearest float16."""
    cut = in_blocks(grid, BLOCK)
    if cut is None or int(cut.codes.max()) > 15:
        return None
    minimum = -cut.scale * cut.zero
    if not bool(torch.isfinite(minimum.half()).all()) or not (rounded or torch.equal(minimum.half().float(), minimum)):
        return None
    return _rows([halves(cut.scale), halves(minimum), _nibbles(cut.codes.numpy())])


def pack_q5_0(grid: Grid) -> Bytes | None:
    """See above. Integer zeros make differences of -15..15 of 4-bit codes: it says every 4-bit affine grid."""
    found = around(grid, BLOCK, 16)
    if found is None:
        return None
    scales, codes = found
    fifth = np.packbits((codes >> 4).reshape(len(codes), -1, BLOCK), axis=2, bitorder="little")
    return _rows([scales, fifth, _nibbles(codes & 15)])


def pack_q8_0(grid: Grid) -> Bytes | None:
    """See above."""
    found = around(grid, BLOCK, 128)
    return None if found is None else _rows([found[0], (found[1] ^ 0x80).reshape(len(found[1]), -1, BLOCK)])


def unpack_q4_0(data: Bytes) -> Unpacked:
    """Codes 0..15; value = scale * (code - 8)."""
    blocks = data.reshape(len(data), -1, 18)
    return Unpacked(_from_nibbles(blocks[:, :, 2:]), float_at(blocks, 0))


def unpack_q4_1(data: Bytes) -> Unpacked:
    """Codes 0..15; value = scale * code - offset."""
    blocks = data.reshape(len(data), -1, 20)
    return Unpacked(_from_nibbles(blocks[:, :, 4:]), float_at(blocks, 0), offset=-float_at(blocks, 2))


def unpack_q5_0(data: Bytes) -> Unpacked:
    """Codes 0..31; value = scale * (code - 16)."""
    blocks = data.reshape(len(data), -1, 22)
    return Unpacked(_from_nibbles(blocks[:, :, 6:]) | _fifth(blocks[:, :, 2:6]), float_at(blocks, 0))


def unpack_q5_1(data: Bytes) -> Unpacked:
    """Codes 0..31; value = scale * code - offset."""
    blocks = data.reshape(len(data), -1, 24)
    codes = _from_nibbles(blocks[:, :, 8:]) | _fifth(blocks[:, :, 4:8])
    return Unpacked(codes, float_at(blocks, 0), offset=-float_at(blocks, 2))


def unpack_q8_0(data: Bytes) -> Unpacked:
    """Codes 0..255; value = scale * (code - 128)."""
    blocks = data.reshape(len(data), -1, 34)
    codes = (blocks[:, :, 2:] ^ 0x80).reshape(len(data), -1)
    return Unpacked(torch.from_numpy(codes), float_at(blocks, 0))


def _rows(parts: list[Bytes]) -> Bytes:
    """Parts of blocks [N, B, bytes] side by side, as [N, bytes of a row]."""
    return np.concatenate(parts, -1).reshape(len(parts[0]), -1)


def halves(table: Tensor) -> Bytes:
    """float32 [N, B] as the two bytes of float16, [N, B, 2]."""
    return table.numpy().astype("<f2")[:, :, None].view(np.uint8)


def float_at(blocks: Bytes, at: int) -> Tensor:
    """The float16 at byte `at` of every block [N, B, bytes]: [N, B]."""
    return torch.from_numpy(np.ascontiguousarray(blocks[:, :, at : at + 2]).view("<f2")[:, :, 0].astype(np.float16))


def _nibbles(codes: Bytes) -> Bytes:
    halves = codes.reshape(len(codes), -1, 2, BLOCK // 2)
    return halves[:, :, 0] | (halves[:, :, 1] << 4)


def _from_nibbles(data: Bytes) -> Tensor:
    codes = np.stack([data & 15, data >> 4], axis=2)
    return torch.from_numpy(codes.reshape(len(data), -1))


def _fifth(data: Bytes) -> Tensor:
    """Bits [N, B, 4] as the value 16 of every code: [N, K]."""
    bits = np.unpackbits(np.ascontiguousarray(data), axis=2, bitorder="little")
    return torch.from_numpy(bits.reshape(len(data), -1) << 4)
