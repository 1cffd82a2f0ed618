"""Dense little-endian bit streams in 32-bit words, as GPTQ and compressed-tensors store codes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

WORD = 32
_ROWS = 1 << 10  # at a time: every bit takes a byte while it is moved


def words(count: int, bits: int) -> int:
    """32-bit words that hold `count` codes."""
    return -(-count * bits // WORD)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [R, C] to int32 [R, ceil(C bits / 32)]: code i of a row takes bits i*bits .. i*bits + bits-1, least
    significant first; a code may lie in two words, and the last bits are 0."""
    return torch.cat([_pack(rows.numpy(), bits) for rows in codes.split(_ROWS)])


def unpack_words(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse: int32 [R, ceil(columns bits / 32)] to codes uint8 [R, columns]."""
    return torch.cat([_unpack(rows.contiguous().numpy(), bits, columns) for rows in packed.split(_ROWS)])


def _pack(codes: np.ndarray, bits: int) -> Tensor:
    rows, columns = codes.shape
    single = (codes[:, :, None] >> np.arange(bits, dtype=np.uint8)) & 1
    stream = np.zeros((rows, words(columns, bits) * WORD), np.uint8)
    stream[:, : columns * bits] = single.reshape(rows, -1)
    return torch.from_numpy(np.packbits(stream, axis=1, bitorder="little").view("<i4").astype(np.int32, copy=False))


def _unpack(packed: np.ndarray, bits: int, columns: int) -> Tensor:
    stream = np.unpackbits(packed.astype("<i4", copy=False).view(np.uint8), axis=1, bitorder="little")
    single = stream[:, : columns * bits].reshape(len(packed), columns, bits)
    return torch.from_numpy((single << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.uint8))
