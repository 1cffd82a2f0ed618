"""Bit-planes: the one saved form of integer codes (DESIGN 1.2). This is the definition; kernels must equal it bit for
bit.

Codes of width b in 1..8 become `uint8 [b, N, ceil(K/8)]`. Plane 0 holds the most significant bit, so the first p
planes of a nested weight are the p-bit weight. Within a row, column k is bit `k % 8` (little-endian) of byte `k // 8`;
padding bits are 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anybit.errors import FormatError
from anybit.formats.form import MAX_BITS as MAX_BITS
from anybit.formats.form import row_bytes as row_bytes


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [N, K], each in 0..2^bits-1, to planes uint8 [bits, N, ceil(K/8)].

    Raises:
        FormatError: wrong shape or dtype, `bits` outside 1..8, or a code that needs more than `bits` bits.
    """
    check_codes(codes, bits)
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes, (0, row_bytes(columns) * 8 - columns))
    weights = (1 << torch.arange(8, dtype=torch.uint8)).to(codes.device)
    planes = [
        (((padded >> (bits - 1 - i)) & 1).view(rows, -1, 8) * weights).sum(-1, dtype=torch.uint8) for i in range(bits)
    ]
    return torch.stack(planes)


def unpack(planes: Tensor, columns: int) -> Tensor:
    """Planes uint8 [b, N, ceil(columns/8)] to codes uint8 [N, columns]; padding bits are ignored.

    Raises:
        FormatError: wrong shape or dtype for this number of columns.
    """
    check_planes(planes, columns)
    bits, rows, _ = planes.shape
    shifts = torch.arange(8, dtype=torch.uint8, device=planes.device)
    codes = torch.zeros(rows, columns, dtype=torch.uint8, device=planes.device)
    for plane in planes:
        ones = ((plane[:, :, None] >> shifts) & 1).flatten(1)[:, :columns]
        codes = codes * 2 + ones if bits > 1 else ones.clone()
    return codes


def check_codes(codes: Tensor, bits: int) -> None:
    """Raise FormatError unless `codes` is uint8 [N, K] with every value below 2^bits."""
    if not 1 <= bits <= MAX_BITS:
        raise FormatError(f"planes hold 1 to {MAX_BITS} bits, got bits={bits}")
    if codes.dtype != torch.uint8 or codes.ndim != 2:
        raise FormatError(f"codes must be uint8 [N, K], got {codes.dtype} {tuple(codes.shape)}")
    if bits < MAX_BITS and codes.numel() and int(codes.max()) >> bits:
        raise FormatError(f"a code of {int(codes.max())} does not fit {bits} bits")


def check_planes(planes: Tensor, columns: int) -> None:
    """Raise FormatError unless `planes` is uint8 [b, N, ceil(columns/8)] with b in 1..8."""
    if planes.dtype != torch.uint8 or planes.ndim != 3 or not 1 <= planes.shape[0] <= MAX_BITS:
        raise FormatError(f"planes must be uint8 [1..8, N, bytes], got {planes.dtype} {tuple(planes.shape)}")
    if planes.shape[2] != row_bytes(columns):
        raise FormatError(f"planes of {columns} columns have {row_bytes(columns)} bytes a row, got {planes.shape[2]}")
