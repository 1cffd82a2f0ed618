"""A weight as the GPU kernels read it: planes once, tables of all widths in a row, the width on the device.

A launch names no precision. The kernel reads the width from the device, and with it where its tables begin; so writing one
integer switches a captured CUDA graph too (methods/pmpd.md section 4), and nothing is copied or compiled again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anybit.errors import FormatError
from anybit.formats.affine import Affine
from anybit.formats.binary_coded import BinaryCoded
from anybit.formats.bipolar import Bipolar
from anybit.formats.codebook import Codebook
from anybit.formats.decoder import Decoder, groups
from anybit.formats.nested_affine import NestedAffine

WIDTHS = 9  # 0..8; entries of widths that are not there are never read
Grid = tuple[Tensor, Tensor | None, tuple[float, float, float]]


@dataclass(frozen=True)
class GpuWeight:
    """A weight [N, K] with all its readable widths; G = ceil(K / group_size).

        affine        scale_mul * scale[n, g] * (code - (zero_mul * zero[n, g] + zero_add))
        binary_coded  offset[n, g] + sum_i alpha[n, g, i] * (2 bit_i - 1)
        codebook      table[n, code]

    Attributes:
        kind: one of these.
        planes: uint8 [b, N, ceil(K/8)], most significant first.
        first: float16, flat: every width's scale [N, G], alpha [N, G, p] or table [N, 2^p].
        second: every width's zero, uint8 [N, G], or offset, float16 [N, G]; flat, at least one element.
        starts: int64 [9, 2]: where width p begins in `first` and in `second`; -1 in `second`: all zero.
        factors: float32 [9, 3]: scale_mul, zero_mul, zero_add of width p; only "affine" reads them.
        group_size, columns: columns per entry of `first`; K.
        precisions: readable widths.
    """

    kind: str
    planes: Tensor
    first: Tensor
    second: Tensor
    starts: Tensor
    factors: Tensor
    group_size: int
    columns: int
    precisions: tuple[int, ...]

    @property
    def rows(self) -> int:
        """N."""
        return self.planes.shape[1]

    def to(self, device: torch.device | str) -> GpuWeight:
        """The same on another device."""
        names = ("planes", "first", "second", "starts", "factors")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def step_bytes(self, bits: int) -> int:
        """Bytes that a product at a width has to read: its planes and its tables."""
        count = groups(self.columns, self.group_size)
        table = {"affine": 3 * count, "binary_coded": 2 * count * (bits + 1), "codebook": 2 * 2**bits}[self.kind]
        return self.rows * (bits * self.planes.shape[2] + table)


def gpu_weight(planes: Tensor, decoder: Decoder, columns: int) -> GpuWeight:
    """The weight of planes uint8 [b, N, ceil(K/8)] under a decoder.

    Raises:
        FormatError: a decoder the GPU kernels do not read.
    """
    widths = decoder.precisions
    if isinstance(decoder, BinaryCoded):
        offsets = decoder.offsets or {}
        grids: list[Grid] = [(decoder.alphas[p], offsets.get(p), (0, 0, 0)) for p in widths]
        return _joined("binary_coded", planes, grids, decoder.group_size, columns, widths)
    if isinstance(decoder, Codebook):
        tables: list[Grid] = [(decoder.tables[p], None, (0, 0, 0)) for p in widths]
        return _joined("codebook", planes, tables, max(columns, 1), columns, widths)
    if isinstance(decoder, (Affine, Bipolar, NestedAffine)):
        steps = [_uniform(decoder, p) for p in widths]
        return _joined("affine", planes, steps, decoder.group_size, columns, widths)
    raise FormatError(f"no GPU kernel reads {decoder.kind} codes")


def _uniform(decoder: Affine | Bipolar | NestedAffine, bits: int) -> Grid:
    """Scale, zero and factors of an evenly spaced grid at a width."""
    if isinstance(decoder, Affine):
        middle = 0.0 if decoder.zero is not None else float(2 ** (decoder.bits - 1))
        return decoder.scale, decoder.zero, (1.0, 1.0, middle)
    if isinstance(decoder, Bipolar):
        return decoder.scale, None, (2.0, 1.0, (2**decoder.bits - 1) / 2)
    step = 2.0 ** (decoder.bits - bits)
    return (*decoder.grid(bits), (step, 1 / step, -(1 - 1 / step) / 2))


def _joined(
    kind: str, planes: Tensor, grids: Sequence[Grid], group_size: int, columns: int, widths: tuple[int, ...]
) -> GpuWeight:
    starts, factors = torch.full((WIDTHS, 2), -1), torch.zeros(WIDTHS, 3)
    firsts, seconds = [0], [0]
    for width, (first, second, numbers) in zip(widths, grids, strict=True):
        starts[width, 0], factors[width] = firsts[-1], torch.tensor(numbers)
        firsts.append(firsts[-1] + first.numel())
        if second is not None:
            starts[width, 1] = seconds[-1]
            seconds.append(seconds[-1] + second.numel())
    first = torch.cat([grid[0].reshape(-1) for grid in grids])
    zeros = [grid[1].reshape(-1) for grid in grids if grid[1] is not None]
    second = torch.cat(zeros) if zeros else torch.zeros(1, dtype=torch.uint8)
    return GpuWeight(kind, planes, first, second, starts, factors, group_size, columns, widths)
