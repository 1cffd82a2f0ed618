"""What `linear_w_a16` computes, in plain PyTorch: any device, any dtype, slow."""

from __future__ import annotations

import torch
from torch import Tensor

from anybit.formats.affine import Affine
from anybit.formats.planes import unpack


def decode(planes: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, columns: int) -> Tensor:
    """Planes uint8 [b, N, ceil(K/8)] to weights float32 [N, K]: scale * (code - zero), one rounding."""
    return Affine(planes.shape[0], group_size, scale, zero).decode(unpack(planes, columns))


def linear(x: Tensor, planes: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, columns: int) -> Tensor:
    """x [T, K] @ W^T as float32 [T, N]."""
    return torch.nn.functional.linear(x.float(), decode(planes, scale, zero, group_size, columns))
