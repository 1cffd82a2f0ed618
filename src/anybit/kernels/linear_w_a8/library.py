"""`linear_w_a8` as one operator of `torch.library`: float in, float out, so that graphs of `torch.compile` and
`torch.export` can hold it. `op.py` has the parts, checked; this quantizes x per token and group and multiplies."""

from __future__ import annotations

import torch
from torch import Tensor

from anybit.errors import FormatError, KernelUnavailable
from anybit.formats.decoder import groups
from anybit.kernels import native
from anybit.kernels.linear_w_a8.op import Quantized, Tiled, linear_quantized
from anybit.kernels.linear_w_a8.tiles import COLUMNS, LINE, ROWS, refusal
from anybit.kernels.quantize_activations import op as quantize_activations


def linear(x: Tensor, w: Tiled) -> Tensor:
    """x float [..., K] times w, x rounded to int8 per token and group of w: [..., N] in the dtype of x. Not differentiable.

    Raises:
        FormatError: shapes or dtypes that do not fit together.
        KernelUnavailable: x is not on the CPU, or anybit._native is not built.
    """
    return linear_op(x, w.planes, w.scale, w.zero, (w.bits, w.rows, w.columns, w.group_size), w.factors)


def _linear(
    x: Tensor, planes: Tensor, scale: Tensor, zero: Tensor | None, sizes: list[int], factors: list[float]
) -> Tensor:
    """sizes: bits, N, K, group_size; factors: scale_mul, zero_mul, zero_add."""
    if len(sizes) != 4 or len(factors) != 3:
        raise FormatError(f"linear_w_a8 takes 4 sizes and 3 factors, got {len(sizes)} and {len(factors)}")
    bits, rows, columns, group_size = sizes
    scale_mul, zero_mul, zero_add = factors
    w = Tiled(planes, scale, zero, bits, rows, columns, group_size, scale_mul, zero_mul, zero_add)
    if reason := native.refusal(x, planes, scale, zero):
        raise KernelUnavailable(f"linear_w_a8 cannot run: {reason}")
    _check(w)
    if x.shape[-1] != columns or not x.is_floating_point():
        raise FormatError(f"x must be float [..., {columns}], got {x.dtype} {tuple(x.shape)}")
    quantized = quantize_activations.quantize(x.reshape(-1, columns).float(), group_size)
    return linear_quantized(Quantized(*quantized), w).to(x.dtype).view(*x.shape[:-1], rows)


def _check(w: Tiled) -> None:
    """Raise FormatError unless the tensors are contiguous tiles of the sizes."""
    if reason := refusal(w.columns, w.group_size):
        raise FormatError(reason)
    blocks, table = -(-w.rows // ROWS), (-(-w.rows // ROWS), groups(w.columns, w.group_size), ROWS)
    tiles = (w.planes.shape[0], blocks, -(-w.columns // COLUMNS), LINE)
    _check_tensor(w.planes, "planes", tiles, torch.uint8)
    if not 1 <= w.bits <= w.planes.shape[0]:
        raise FormatError(f"bits must be 1 to {w.planes.shape[0]} (the planes stored), got {w.bits}")
    _check_tensor(w.scale, "scale", table, torch.float16)
    if w.zero is not None:
        _check_tensor(w.zero, "zero", (*table[:2], ROWS // 2 if w.zero.shape[-1] == ROWS // 2 else ROWS), torch.uint8)


def _check_tensor(tensor: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        kind = str(dtype).removeprefix("torch.")
        raise FormatError(f"{name} must be contiguous {kind} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")


linear_op = torch.library.custom_op(
    "anybit::linear_w_a8",
    _linear,
    mutates_args=(),
    schema="(Tensor x, Tensor planes, Tensor scale, Tensor? zero, int[] sizes, float[] factors) -> Tensor",
)


@linear_op.register_fake
def _(x: Tensor, planes: Tensor, scale: Tensor, zero: Tensor | None, sizes: list[int], factors: list[float]) -> Tensor:  # noqa: ARG001
    return x.new_empty(*x.shape[:-1], sizes[1])
