"""What `linear_bits` and `linear_lut` compute, in int64: obvious and slow."""

from __future__ import annotations

import torch
from torch import Tensor

from anybit.errors import FormatError
from anybit.kernels.linear_bits.encoding import Encoding
from anybit.kernels.linear_bits.weight import CodedWeight


def activation_values(x: Tensor, encoding: Encoding) -> Tensor:
    """Codes int8 or uint8 [T, K] to the integers they stand for, int64 [T, K].

    Raises:
        FormatError: a code that does not fit the planes.
    """
    bits = encoding.bits
    low = -(1 << (bits - 1)) if x.dtype == torch.int8 else 0
    if x.numel() and not low <= int(x.min()) <= int(x.max()) < low + (1 << bits):
        raise FormatError(
            f"x has codes {int(x.min())} to {int(x.max())}; {bits} planes hold {low} to {low + (1 << bits) - 1}"
        )
    total = torch.full(x.shape, encoding.offset, dtype=torch.int64)
    for i, coefficient in enumerate(encoding.coefficients):
        total += coefficient * ((x.long() >> (bits - 1 - i)) & 1)
    return total


def integers(x: Tensor, weight: CodedWeight) -> Tensor:
    """x int64 [T, K] times the weight's integers, per group: int64 [T, N, G]."""
    values = weight.values()
    # Matrix products of int64 are not vectorized in PyTorch, and float64 holds these sums exactly (below 2^53).
    parts = zip(x.double().split(weight.group_size, 1), values.double().split(weight.group_size, 1), strict=True)
    sums = [a @ b.T for a, b in parts]
    return torch.stack(sums, -1).long() if sums else x.new_zeros(x.shape[0], weight.rows, 0)


def linear(x: Tensor, x_scale: Tensor, weight: CodedWeight) -> Tensor:
    """sum_g (scale[n, g] x_scale[t]) integers[t, n, g] as float32 [T, N]; groups left to right, one rounding each."""
    y = torch.zeros(x.shape[0], weight.rows)
    for g, exact in enumerate(integers(x, weight).unbind(-1)):
        product = exact.float().double() * (weight.scale[:, g] * x_scale[:, None]).double()
        y = (product + y.double()).float()
    return y
