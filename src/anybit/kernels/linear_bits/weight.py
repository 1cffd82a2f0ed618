"""An integer-coded weight as `linear_bits` and `linear_lut` take it: canonical planes, what they mean, one scale a group."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.errors import FormatError
from anybit.formats.decoder import groups, per_column
from anybit.formats.planes import check_planes, unpack
from anybit.kernels.linear_bits.encoding import Encoding

LARGEST = 2**31 - 1


@dataclass(frozen=True)
class CodedWeight:
    """w[n, k] = scale[n, g] * (sum_i coefficients[i] bit_i[n, k] + offset[n, g]), g = k // group_size.

    Attributes:
        planes: uint8 [p, N, ceil(K/8)], most significant first; padding bits are ignored.
        columns: K.
        encoding: what the p planes mean; its own offset is replaced by `offset`.
        group_size: columns per scale, 1..K.
        scale: float32 [N, G].
        offset: int32 [N, G], e.g. minus the zero point.
    """

    planes: Tensor
    columns: int
    encoding: Encoding
    group_size: int
    scale: Tensor
    offset: Tensor

    @classmethod
    def of(
        cls,
        planes: Tensor,
        columns: int,
        encoding: Encoding,
        group_size: int | None = None,
        scale: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> CodedWeight:
        """Checked; without them one group a row, scale 1 and the encoding's offset.

        Raises:
            FormatError: parts that do not fit together.
        """
        check_planes(planes, columns)
        if planes.shape[0] != encoding.bits:
            raise FormatError(f"the encoding has {encoding.bits} planes, the weight {planes.shape[0]}")
        size = columns if group_size is None else group_size
        if not 1 <= size <= columns:
            raise FormatError(f"group_size must be 1 to {columns} (the columns), got {size}")
        table = (planes.shape[1], groups(columns, size))
        scale = torch.ones(table) if scale is None else scale
        offset = torch.full(table, encoding.offset, dtype=torch.int32) if offset is None else offset
        for name, tensor, dtype in (("scale", scale, torch.float32), ("offset", offset, torch.int32)):
            if tensor.shape != table or tensor.dtype != dtype:
                raise FormatError(f"{name} must be {dtype} {table}, got {tensor.dtype} {tuple(tensor.shape)}")
        return cls(planes, columns, encoding, size, scale.contiguous(), offset.contiguous())

    @property
    def rows(self) -> int:
        """N."""
        return int(self.planes.shape[1])

    def codes(self) -> Tensor:
        """sum_i coefficients[i] bit_i as int32 [N, K]."""
        total = torch.zeros(self.rows, self.columns, dtype=torch.int32, device=self.planes.device)
        for plane, coefficient in zip(self.planes, self.encoding.coefficients, strict=True):
            total += coefficient * unpack(plane[None], self.columns).int()
        return total

    def code_sums(self) -> Tensor:
        """Codes added up over each group, int32 [N, G]; FormatError when 32 bits may not hold them."""
        largest = max(map(abs, self.encoding.span(0)))
        if largest * self.group_size > LARGEST:
            raise FormatError(
                f"sums of {self.group_size} codes up to {largest} exceed 32 bits; use a smaller group_size"
            )
        whole = -(-self.columns // self.group_size) * self.group_size
        padded = torch.nn.functional.pad(self.codes(), (0, whole - self.columns))
        return padded.view(self.rows, -1, self.group_size).sum(-1, dtype=torch.int32)

    def values(self) -> Tensor:
        """The integers codes + offset, int64 [N, K]."""
        return self.codes().long() + per_column(self.offset, self.columns, self.group_size).long()

    def reach(self) -> int:
        """Bound of |code + offset| over the weight."""
        edges = (int(self.offset.min()), int(self.offset.max())) if self.offset.numel() else (0,)
        return max(abs(end) for edge in edges for end in self.encoding.span(edge))


@functools.lru_cache(maxsize=256)
def check_reach(group_size: int, weight_reach: int, x: Encoding) -> None:
    """Raise FormatError when a group's exact sum, or the sum of its activation codes, may need more than 32 bits."""
    x_reach = max(map(abs, x.span()))
    if max(weight_reach * x_reach, max(map(abs, x.span(0)))) * group_size > LARGEST:
        raise FormatError(
            f"sums of {group_size} products up to {weight_reach} x {x_reach} exceed 32 bits; use a smaller group_size"
        )


def check_activations(x: Tensor, x_scale: Tensor | None, columns: int) -> None:
    """Raise FormatError unless x is int8 or uint8 [T, columns] and x_scale float32 [T]."""
    if x.ndim != 2 or x.shape[1] != columns or x.dtype not in (torch.int8, torch.uint8):
        raise FormatError(f"x must be int8 or uint8 [T, {columns}], got {x.dtype} {tuple(x.shape)}")
    if x_scale is not None and (x_scale.shape != x.shape[:1] or x_scale.dtype != torch.float32):
        raise FormatError(f"x_scale must be float32 ({x.shape[0]},), got {x_scale.dtype} {tuple(x_scale.shape)}")
