"""The float part beside an integer product: y += side @ weight^T, a few columns wide.

A token's side is [offsets of its groups | its columns that bypass quantization]; the weight beside it [sums of rows over those
groups | float columns]. Columns are added one after the other, each product with one rounding, so that y[t, n] depends on token
t and row n alone, bit for bit: not on other tokens, threads or the instruction set.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anybit.errors import FormatError
from anybit.kernels import native
from anybit.kernels.linear_side.tiles import Side


def add_(y: Tensor, side: Tensor, weight: Side) -> Tensor:
    """y float32 [T, N], contiguous, plus side float32 [T, W] times `weight`, in place; returned.

    Raises:
        FormatError: shapes or dtypes that do not fit together.
        KernelUnavailable: anybit._native is not built.
    """
    for tensor, columns in ((y, weight.rows), (side, weight.width)):
        if tensor.shape != (len(y), columns) or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise FormatError(
                f"need contiguous float32 [{len(y)}, {columns}], got {tensor.dtype} {tuple(tensor.shape)}"
            )
    native.loaded().add_side(side.data_ptr(), len(y), *weight.pointers, weight.rows, y.data_ptr())
    return y
