"""What `linear_integer` computes, by the three kernels that it joins; also the way of schemes that it does not know."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from anybit.formats.activation import ActivationSpec
from anybit.kernels.linear_side import op as linear_side
from anybit.kernels.linear_side.tiles import Side
from anybit.kernels.linear_w_a8 import op as linear_w_a8
from anybit.kernels.quantize_activations.encode import encode


def linear(
    weight: linear_w_a8.Tiled,
    spec: ActivationSpec,
    side: Side | None,
    tensors: Mapping[str, Tensor],
    bypass: Tensor | None,
    x: Tensor,
) -> Tensor:
    """x float32 or bfloat16 [T, K] -> [T, N] in the dtype of x, with any scheme; see `op.IntegerLinear`."""
    codes = encode(x.float(), spec, weight.group_size, tensors, bypass)
    y = linear_w_a8.linear_quantized(linear_w_a8.Quantized(codes.codes, codes.scale, codes.sums), weight)
    if side is not None:
        linear_side.add_(y, codes.side, side)
    return y.to(x.dtype)
