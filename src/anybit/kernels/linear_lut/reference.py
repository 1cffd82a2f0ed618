"""What `linear_lut` computes: the definition is shared with `linear_bits`, for x codes that are plain int8."""

from __future__ import annotations

from torch import Tensor

from anybit.kernels.linear_bits import reference
from anybit.kernels.linear_bits.weight import CodedWeight


def integers(x: Tensor, weight: CodedWeight) -> Tensor:
    """x int8 [T, K] times the weight's integers, per group: int64 [T, N, G]."""
    return reference.integers(x.long(), weight)


def linear(x: Tensor, x_scale: Tensor, weight: CodedWeight) -> Tensor:
    """sum_g (scale[n, g] x_scale[t]) integers[t, n, g] as float32 [T, N]; groups left to right, one rounding each."""
    return reference.linear(x.long(), x_scale, weight)
