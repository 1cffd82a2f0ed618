"""GGUF's K types: 256 columns with float16 scales, small integer scales inside.

    Q4_K  d * s * q - dmin * m   d, dmin; 12 bytes of 8 six-bit s and m; 128: byte j of 64 columns holds code j low, j + 32 high
    Q5_K  as Q4_K                32 bytes before the 128: bit i of byte j is the fifth bit of code j of the i-th 32 columns
    Q6_K  d * s * (q - 32)       128 bytes of low nibbles, 64 of high pairs, 16 int8 s (one per 16 columns), d

`pack_*` say a grid whose scale is one over 256 columns, with s = 1 and, for Q4_K, dmin = d and m = zero.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from anybit.integrations.exchange.grid import Grid
from anybit.integrations.gguf.blocks import Bytes, Unpacked, around, float_at, halves, in_blocks

SUPER = 256


def pack_q4_k(grid: Grid) -> Bytes | None:
    """uint8 [N, bytes of a row], or None where Q4_K cannot say it so."""
    cut = in_blocks(grid, SUPER)
    if cut is None or not cut.has_integer_zeros or int(cut.codes.max()) > 15 or float(cut.zero.max()) > 63:
        return None
    rows, blocks = cut.scale.shape
    out = np.zeros((rows, blocks, 144), np.uint8)
    out[:, :, :2] = out[:, :, 2:4] = halves(cut.scale)
    minimum = cut.zero.numpy().astype(np.uint8)[:, :, None]
    out[:, :, 4:8] = 1
    out[:, :, 8:12] = minimum & 63
    out[:, :, 12:16] = 1 | (minimum & 15) << 4
    out[:, :, 8:12] |= (minimum >> 4) << 6
    pairs = cut.codes.numpy().reshape(rows, blocks, 4, 2, 32)
    out[:, :, 16:] = (pairs[:, :, :, 0] | pairs[:, :, :, 1] << 4).reshape(rows, blocks, 128)
    return out.reshape(rows, -1)


def unpack_q4_k(data: Bytes) -> Unpacked:
    """Codes 0..15, eight groups of 32 to a block."""
    blocks = data.reshape(len(data), -1, 144)
    return _with_minima(blocks, _pairs(blocks[:, :, 16:]))


def unpack_q5_k(data: Bytes) -> Unpacked:
    """Codes 0..31, eight groups of 32 to a block."""
    blocks = data.reshape(len(data), -1, 176)
    fifth = blocks[:, :, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return _with_minima(blocks, _pairs(blocks[:, :, 48:]) | fifth << 4)


def _pairs(data: Bytes) -> Bytes:
    """Nibbles [N, B, 128] as codes [N, B, 8, 32]."""
    nibbles = data.reshape(*data.shape[:2], 4, 1, 32)
    return np.concatenate([nibbles & 15, nibbles >> 4], 3).reshape(*data.shape[:2], 8, 32)


def _with_minima(blocks: Bytes, codes: Bytes) -> Unpacked:
    """Codes [N, B, 8, 32] with the scales and minima at the head of every block."""
    d, dmin = float_at(blocks, 0), float_at(blocks, 2)
    low, middle, high = (blocks[:, :, at : at + 4] for at in (4, 8, 12))
    step = np.concatenate([low & 63, (high & 15) | (low >> 6) << 4], -1)
    minimum = np.concatenate([middle & 63, (high >> 4) | (middle >> 6) << 4], -1)
    return Unpacked(_codes(codes), d, _steps(step), dmin, _steps(minimum))


def pack_q6_k(grid: Grid) -> Bytes | None:
    """uint8 [N, bytes of a row], or None where Q6_K cannot say it so."""
    found = around(grid, SUPER, 32)
    if found is None:
        return None
    scales, (rows, blocks) = found[0], found[0].shape[:2]
    codes = found[1].reshape(rows, blocks, 2, 4, 32)
    a, b, c, d = (codes[:, :, :, i] for i in range(4))
    out = np.zeros((rows, blocks, 210), np.uint8)
    low = np.stack([(a & 15) | (c & 15) << 4, (b & 15) | (d & 15) << 4], 3)
    high = (a >> 4) | (b >> 4) << 2 | (c >> 4) << 4 | (d >> 4) << 6
    out[:, :, :128] = low.reshape(rows, blocks, 128)
    out[:, :, 128:192] = high.reshape(rows, blocks, 64)
    out[:, :, 192:208] = 1
    out[:, :, 208:] = scales
    return out.reshape(rows, -1)


def unpack_q6_k(data: Bytes) -> Unpacked:
    """Codes 0..63 around 32, sixteen groups of 16 to a block."""
    blocks = data.reshape(len(data), -1, 210)
    low = blocks[:, :, :128].reshape(len(data), -1, 2, 2, 32)
    high = blocks[:, :, 128:192].reshape(len(data), -1, 2, 32)
    nibbles = (low[:, :, :, 0] & 15, low[:, :, :, 1] & 15, low[:, :, :, 0] >> 4, low[:, :, :, 1] >> 4)
    codes = np.stack([nibble | (high >> 2 * i & 3) << 4 for i, nibble in enumerate(nibbles)], 3)
    return Unpacked(_codes(codes), float_at(blocks, 208), _steps(blocks[:, :, 192:208].view(np.int8)))


def _codes(codes: Bytes) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(codes).reshape(len(codes), -1))


def _steps(steps: NDArray[np.generic]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(steps).reshape(len(steps), -1).astype(np.int8))
