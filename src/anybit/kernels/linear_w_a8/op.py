"""Linear by integer arithmetic: bit-plane weights of 1 to 8 bits times int8 activations.

Sums of products are exact int32 per group; float appears once, in a fixed order (cpu.cpp), so that a result depends
neither on the instruction set (multiply-adds are fused everywhere), nor on the number of tokens or threads.
Weights are repacked once (`tile`) from the saved planes; a weight of b planes runs at p < b bits by reading p planes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.errors import FormatError
from anybit.formats.decoder import groups
from anybit.formats.planes import check_planes
from anybit.kernels import native
from anybit.kernels.quantize_activations import op as quantize_activations

ROWS, COLUMNS, LINE = 16, 32, 64
MAX_COLUMNS = (2**31 - 1) // (127 * 255)
"""Columns that one int32 sum can hold, 66,311: 127 * 255 * K < 2^31."""


@dataclass(frozen=True)
class Tiled:
    """A weight [N, K] in the kernel's layout: scale_mul scale (code - (zero_mul zero + zero_add)).

    Attributes:
        planes: uint8 [b, ceil(N/16), ceil(K/32), 64], most significant plane first.
        scale: float16 [ceil(N/16), G, 16]; rows beyond N are 0.
        zero: uint8 [ceil(N/16), G, 16], or [ceil(N/16), G, 8] for stored codes of up to 4 bits (row r in the low nibble
            of byte r, row r + 8 in the high one), or None: `zero_add` alone.
        bits: planes in use, 1..b.
        rows, columns: N, K.
        group_size: columns per scale; a multiple of 32, or K.
        scale_mul, zero_mul, zero_add: factors that turn the stored grid into the one in use.
    """

    planes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    rows: int
    columns: int
    group_size: int
    scale_mul: float
    zero_mul: float
    zero_add: float

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """bits, N, K, group_size, G, bytes of a group's zeros: as the native module takes them."""
        count = groups(self.columns, self.group_size)
        return (
            self.bits,
            self.rows,
            self.columns,
            self.group_size,
            count,
            0 if self.zero is None else self.zero.shape[2],
        )

    @property
    def factors(self) -> tuple[float, float, float]:
        """scale_mul, zero_mul, zero_add."""
        return self.scale_mul, self.zero_mul, self.zero_add


@dataclass(frozen=True)
class Quantized:
    """Activations [T, K] as `quantize_activations` gives them: codes int8 [T, stride], scale and sums float32 [T, G]."""

    codes: Tensor
    scale: Tensor
    sums: Tensor


def refusal(columns: int, group_size: int) -> str:
    """Why a weight of this shape cannot run here; empty when it can."""
    if group_size % COLUMNS and group_size < columns:
        return f"group_size {group_size} is neither a multiple of {COLUMNS} nor the whole row of {columns}"
    if min(group_size, columns) > MAX_COLUMNS:
        return f"{columns} columns in one group could overflow a 32-bit sum (at most {MAX_COLUMNS})"
    return ""


Parts = Sequence[tuple[Tensor, Tensor, Tensor | None]]
Empty = Callable[[tuple[int, ...], torch.dtype], Tensor]


def tile(planes: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, columns: int) -> Tiled:
    """Affine planes uint8 [b, N, ceil(K/8)], scale float16 [N, G], zero uint8 [N, G] or None (2^(b-1)) as tiles.

    Raises:
        FormatError: shapes or dtypes that do not fit together, or a shape that `refusal` names.
    """
    return tile_joined([(planes, scale, zero)], group_size, columns)


def tile_joined(parts: Parts, group_size: int, columns: int, empty: Empty | None = None) -> Tiled:
    """`tile` of weights that read the same input, one below the other: (planes, scale, zero) of each, of equal width.

    `empty(shape, dtype)` gives the memory; default: `torch.empty`. Errors are those of `tile`.
    """
    if len(parts) > 1 and any(planes.shape[1] % ROWS for planes, _, _ in parts[:-1]):
        return tile_joined([_concatenated(parts)], group_size, columns, empty)
    if reason := refusal(columns, group_size):
        raise FormatError(reason)
    allocate = empty or (lambda shape, dtype: torch.empty(shape, dtype=dtype))
    bits, count = len(parts[0][0]), groups(columns, group_size)
    rows, blocks = sum(planes.shape[1] for planes, _, _ in parts), sum(_blocks(planes) for planes, _, _ in parts)
    tiles = allocate((bits, blocks, -(-columns // COLUMNS), LINE), torch.uint8)
    table = allocate((blocks, count, ROWS), torch.float16)
    zeros = None if parts[0][2] is None else allocate((blocks, count, ROWS // 2 if bits <= 4 else ROWS), torch.uint8)
    block = 0
    for planes, scale, zero in parts:
        _check_part(planes, scale, zero, count, columns)
        if len(planes) != bits or (zero is None) != (zeros is None):
            raise FormatError("weights of different widths or symmetry cannot be joined")
        end = block + _blocks(planes)
        _tile_planes(planes, tiles[:, block:end], columns)
        tile_table(scale, table[block:end])
        if zero is not None and zeros is not None:
            _tile_zeros(zero, zeros[block:end])
        block = end
    middle = 0.0 if zeros is not None else float(2 ** (bits - 1))
    return Tiled(tiles, table, zeros, bits, rows, columns, group_size, 1.0, 1.0, middle)


def _check_part(planes: Tensor, scale: Tensor, zero: Tensor | None, count: int, columns: int) -> None:
    check_planes(planes, columns)
    table = (planes.shape[1], count)
    if scale.shape != table or scale.dtype != torch.float16:
        raise FormatError(f"scale must be float16 {table}, got {scale.dtype} {tuple(scale.shape)}")
    if zero is not None and (zero.shape != table or zero.dtype != torch.uint8):
        raise FormatError(f"zero must be uint8 {table}, got {zero.dtype} {tuple(zero.shape)}")


def _concatenated(parts: Parts) -> tuple[Tensor, Tensor, Tensor | None]:
    planes, scales, zeros = zip(*parts, strict=True)
    return torch.cat(planes, 1), torch.cat(scales), None if zeros[0] is None else torch.cat(zeros)


def _blocks(planes: Tensor) -> int:
    return -(-planes.shape[1] // ROWS)


def _tile_planes(planes: Tensor, tiles: Tensor, columns: int) -> None:
    """Planes [b, N, bytes] into tiles [b, blocks, chunks, 64], which may be a stretch of a larger weight's blocks."""
    for plane, lines in zip(planes.contiguous(), tiles, strict=True):
        native.loaded().tile_planes(plane.data_ptr(), lines.data_ptr(), 1, len(plane), columns)


def tile_table(table: Tensor, tiled: Tensor) -> None:
    """[N, G] to [ceil(N/16), G, 16], missing rows 0."""
    rows, count = table.shape
    native.loaded().tile_table(table.contiguous().data_ptr(), rows, count, table.itemsize, tiled.data_ptr())


def _tile_zeros(zero: Tensor, tiled: Tensor) -> None:
    """Zeros [N, G] to [ceil(N/16), G, 16 or 8]: a byte or a nibble each."""
    if tiled.shape[2] == ROWS:
        return tile_table(zero, tiled)
    whole = torch.empty(*tiled.shape[:2], ROWS, dtype=torch.uint8)
    tile_table(zero, whole)
    torch.bitwise_or(whole[..., :8], whole[..., 8:] << 4, out=tiled)
    return None


def quantize(x: Tensor, group_size: int) -> Quantized:
    """x float32 [T, K] to int8 codes with one scale per token and group (kernels/quantize_activations)."""
    return Quantized(*quantize_activations.quantize(x, group_size))


def sums(x: Quantized, w: Tiled) -> Tensor:
    """The exact sums of codes times codes, int32 [T, G, N]."""
    out = torch.empty(len(x.codes), w.sizes[4], w.rows, dtype=torch.int32)
    native.loaded().linear_w_a8_sums(x.codes.data_ptr(), len(x.codes), w.planes.data_ptr(), w.sizes, out.data_ptr())
    return out


def linear_quantized(x: Quantized, w: Tiled) -> Tensor:
    """Quantized activations times w: float32 [T, N]."""
    y = torch.empty(len(x.codes), w.rows)
    native.loaded().linear_w_a8(
        x.codes.data_ptr(),
        x.scale.data_ptr(),
        x.sums.data_ptr(),
        len(x.codes),
        w.planes.data_ptr(),
        w.scale.data_ptr(),
        0 if w.zero is None else w.zero.data_ptr(),
        w.sizes,
        w.factors,
        y.data_ptr(),
    )
    return y
