"""What `linear_side` computes, one rounding for each product and sum, in plain PyTorch: slow and obvious."""

from __future__ import annotations

import torch
from torch import Tensor


def add(y: Tensor, side: Tensor, weight: Tensor) -> Tensor:
    """y float32 [T, N] + side float32 [T, W] times weight float32 [N, W], column by column, each product added with one
    rounding (float64 holds a product of two float32 exactly, and rounding its sum twice differs from once almost never)."""
    for j in range(side.shape[1]):
        product = side[:, j : j + 1].double() * weight[:, j].double()
        y = (y.double() + product).to(torch.float32)
    return y
