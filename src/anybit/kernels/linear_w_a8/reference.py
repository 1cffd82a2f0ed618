"""What `linear_w_a8` computes and how tiles are laid out, in plain PyTorch: slow and obvious."""

from __future__ import annotations

import torch
from torch import Tensor

from anybit.formats.decoder import groups
from anybit.formats.planes import unpack

ROWS, COLUMNS, LINE = 16, 32, 64


def tile(planes: Tensor, columns: int) -> Tensor:
    """Planes uint8 [b, N, ceil(K/8)] to tiles uint8 [b, ceil(N/16), ceil(K/32), 64].

    Byte 16 l + 2 q + h of a line holds columns 4 q .. 4 q + 3 of row 4 l + 2 h in its low nibble and of the next row in
    the high one; rows and columns beyond the weight are 0.
    """
    bits, rows, _ = planes.shape
    blocks, chunks = -(-rows // ROWS), -(-columns // COLUMNS)
    cells = torch.zeros(bits, blocks * ROWS, chunks * COLUMNS, dtype=torch.uint8)
    for i in range(bits):
        cells[i, :rows, :columns] = unpack(planes[i : i + 1], columns)
    # axes: bits, blocks, l, h, row of the pair, chunks, q, column of the quad
    cells = cells.view(bits, blocks, 4, 2, 2, chunks, 8, 4)
    weights = torch.tensor([[1, 2, 4, 8], [16, 32, 64, 128]], dtype=torch.uint8).view(2, 1, 1, 4)
    lines = (cells * weights).sum((4, 7), dtype=torch.int32).to(torch.uint8)  # bits, blocks, l, h, chunks, q
    return lines.permute(0, 1, 4, 2, 5, 3).reshape(bits, blocks, chunks, LINE).contiguous()


def untile(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """The codes uint8 [N, K] in tiles; the inverse of `tile` after `unpack`."""
    bits, blocks, chunks, _ = tiles.shape
    lines = tiles.view(bits, blocks, chunks, 4, 8, 2).permute(0, 1, 3, 5, 2, 4)  # bits, blocks, l, h, chunks, q
    shifts = torch.arange(8, dtype=torch.uint8).view(2, 1, 1, 4)
    cells = (lines[:, :, :, :, None, :, :, None] >> shifts) & 1
    cells = cells.reshape(bits, blocks * ROWS, chunks * COLUMNS)[:, :rows, :columns].int()
    weights = 2 ** torch.arange(bits - 1, -1, -1, dtype=torch.int32)
    return (cells * weights.view(-1, 1, 1)).sum(0).to(torch.uint8)


def decompress(tiles: Tensor, mask: Tensor, rows: int, columns: int) -> Tensor:
    """The codes uint8 [N, K] in compressed tiles of a 2:4-sparse weight: uint8 [b, ceil(N/16), ceil(K/64), 64], and mask uint8
    [ceil(N/16), ceil(K/32), 64], of which a row of a line has four bytes."""
    bits, blocks, chunks = len(tiles), len(mask), mask.shape[1]
    fours = -(-columns // 4)
    kept = untile(tiles, blocks * ROWS, fours * 2).view(blocks * ROWS, fours, 2)
    bytes_ = mask.view(blocks, chunks, ROWS, 4).permute(0, 2, 1, 3).reshape(1, blocks * ROWS, chunks * 4)
    marked = unpack(bytes_, chunks * COLUMNS).view(blocks * ROWS, -1, 4)[:, :fours]
    place = (marked.cumsum(2) - 1).clamp(0, 1)
    codes = kept.gather(2, place) * marked
    return (codes ^ 2 ** (bits - 1)).reshape(blocks * ROWS, -1)[:rows, :columns]


def sums(codes: Tensor, weights: Tensor, group_size: int) -> Tensor:
    """Activation codes int8 [T, K] times weight codes uint8 [N, K], per group: int64 [T, G, N]."""
    count = groups(weights.shape[1], group_size)
    parts = [slice(g * group_size, (g + 1) * group_size) for g in range(count)]
    return torch.stack([codes[:, part].long() @ weights[:, part].long().T for part in parts], dim=1)


def linear(codes: Tensor, x_scale: Tensor, weights: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> Tensor:
    """y float64 [T, N]: scale [N, G] (code - zero [N, G]) times x_scale [T, G] x, summed over groups."""
    total = sums(codes, weights, group_size).double()
    count = total.shape[1]
    x_sums = torch.stack([codes[:, g * group_size : (g + 1) * group_size].long().sum(1) for g in range(count)], dim=1)
    centred = total - x_sums.double()[:, :, None] * zero.double().T
    return (centred * x_scale.double()[:, :, None] * scale.double().T).sum(1)
