"""Dual-grained weights for the integer kernel, expanded to bytes: exact, at the price of 8 bits a weight.

The inner product group_scale * (code - group_zero) is an int8 weight. It is stored as the 8-bit code product + 128 with
zero 128 and the channel's scale, one group a row: the same numbers to the bit, and activations have one scale a token,
as DGQ and QoQ want it. A kernel that expands groups in integers itself would read `bits` planes instead of 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anybit.formats.dual_grained import DualGrained
from anybit.formats.planes import pack, unpack

_ROWS = 512
"""Rows expanded at a time: a few megabytes of integers, whatever the size of the layer."""


def as_bytes(planes: Tensor, decoder: DualGrained, columns: int) -> tuple[Tensor, Tensor, None]:
    """Planes uint8 [8, N, ceil(K/8)], scale float16 [N, 1] and no zero (128), as `op.tile` takes them.

    Args:
        planes: uint8 [b, N, ceil(K/8)].
        decoder: of these codes.
        columns: K, also the group size of the result.

    Raises:
        FormatError: an integer weight outside int8.
    """
    parts = []
    for start in range(0, planes.shape[1], _ROWS):
        rows = slice(start, start + _ROWS)
        tables = (decoder.channel_scale[rows], decoder.group_scale[rows], decoder.group_zero[rows])
        some = DualGrained(decoder.bits, decoder.group_size, *tables)
        integer = some.integer(unpack(planes[:, rows], columns))
        parts.append(pack(integer.view(torch.uint8) ^ 0x80, 8))  # the sign bit flipped: + 128
    return torch.cat(parts, 1), decoder.channel_scale, None
