"""Weight-only linear: y = x W^T with W in affine bit-planes and x in float ("a16": activations are not quantized).

    native-lookup  few tokens: planes are used as they are, through tables of four-column sums (cpu.cpp)
    native-decode  many tokens: a block of rows is decoded, PyTorch multiplies
    reference      anything else

x is computed in float32 whatever its dtype; y has the dtype of x. For `native-lookup`, y[t] depends on x[t] alone, bit
for bit: not on the other tokens, not on the number of threads.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from anybit.errors import FormatError, KernelUnavailable
from anybit.formats.decoder import groups
from anybit.formats.planes import check_planes
from anybit.kernels import native
from anybit.kernels.linear_w_a16 import reference

LOOKUP_TOKENS = 12  # beyond it, decoding once is cheaper than looking up for every token (NOTES.md)
# Decoded at a time, 4 MiB: in blocks that fit the second-level cache PyTorch multiplies 20 % slower.
DECODE_FLOATS = 1 << 20

_local = threading.local()


def linear(
    x: Tensor,
    planes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_size: int,
    columns: int,
    impl: str | None = None,
) -> Tensor:
    """x [..., K] @ W^T as [..., N] in the dtype of x; differentiable in x.

    Args:
        x: float [..., K].
        planes: uint8 [b, N, ceil(K/8)], most significant first; padding bits are ignored.
        scale: float16 [N, G], G = ceil(K / group_size).
        zero: uint8 [N, G], or None: 2^(b-1).
        group_size: columns per scale, 1..K.
        columns: K.
        impl: force one of the implementations above.

    Raises:
        FormatError: shapes or dtypes that do not fit together.
        KernelUnavailable: the forced `impl` cannot run here.
    """
    run = _linear if _eager(x) else linear_op
    return run(x, planes, scale, zero, group_size, columns, impl)


class Prepared:
    """`linear` by one weight, checked once: a decode step makes hundreds of calls of some tens of microseconds."""

    def __init__(self, planes: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, columns: int) -> None:
        """Arguments and errors of `linear`."""
        check_weight(planes, scale, zero, group_size, columns)
        self._weight = (planes, scale, zero, group_size, columns)
        tensors = [tensor for tensor in (planes, scale, zero) if tensor is not None]
        self._simple = (
            columns > 0 and not native.refusal(*tensors) and all(tensor.is_contiguous() for tensor in tensors)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] @ W^T as [..., N] in the dtype of x; differentiable in x."""
        planes, scale, zero, group_size, columns = self._weight
        tokens = x.numel() // columns
        if (
            not self._simple
            or tokens > LOOKUP_TOKENS
            or x.dtype != torch.float32
            or x.shape[-1] != columns
            or not (x.is_cpu and x.is_contiguous())
            or not _eager(x)
        ):
            return linear(x, planes, scale, zero, group_size, columns)
        bits, out, _ = planes.shape
        y = torch.empty(*x.shape[:-1], out)
        _run_lookup(x, planes, scale, zero, y, (tokens, bits, out, columns, group_size))
        return y


def decode(planes: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, columns: int) -> Tensor:
    """The weights as float32 [N, K]: scale * (code - zero), equal to `formats.affine.Affine.decode` bit for bit."""
    check_weight(planes, scale, zero, group_size, columns)
    if native.refusal(planes, scale, zero):
        return reference.decode(planes, scale, zero, group_size, columns)
    values = torch.empty(planes.shape[1], columns)
    _decode_rows(planes, scale, zero, group_size, values, 0)
    return values


def choose(tokens: int, *tensors: Tensor | None) -> str:
    """The implementation that runs this many tokens on the device of these tensors."""
    return _best(tokens, native.refusal(*tensors))


def check_weight(planes: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, columns: int) -> None:
    """Raise FormatError unless the parts describe one weight."""
    check_planes(planes, columns)
    if not 1 <= group_size <= max(columns, 1):
        raise FormatError(f"group_size must be 1 to {columns} (the columns), got {group_size}")
    table = (planes.shape[1], groups(columns, group_size))
    if scale.shape != table or scale.dtype != torch.float16:
        raise FormatError(f"scale must be float16 {table}, got {scale.dtype} {tuple(scale.shape)}")
    if zero is not None and (zero.shape != table or zero.dtype != torch.uint8):
        raise FormatError(f"zero must be uint8 {table}, got {zero.dtype} {tuple(zero.shape)}")


def _eager(x: Tensor) -> bool:
    """Whether nobody is tracing or differentiating; then the dispatcher, dearer than a small kernel, is not needed."""
    return type(x) is Tensor and not torch.compiler.is_compiling() and not (x.requires_grad and torch.is_grad_enabled())


def _linear(
    x: Tensor,
    planes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_size: int,
    columns: int,
    impl: str | None = None,
) -> Tensor:
    check_weight(planes, scale, zero, group_size, columns)
    if x.shape[-1] != columns or not x.is_floating_point():
        raise FormatError(f"x must be float [..., {columns}], got {x.dtype} {tuple(x.shape)}")
    rows = x.reshape(-1, columns)
    run = IMPLEMENTATIONS[_pick(impl, rows.shape[0], native.refusal(x, planes, scale, zero))]
    y = run(rows.float(), planes, scale, zero, group_size, columns)
    return y.to(x.dtype).view(*x.shape[:-1], planes.shape[1])


def _pick(impl: str | None, tokens: int, reason: str) -> str:
    """The forced implementation if it can run, else the best one; `reason` says why native ones cannot."""
    if impl is None:
        if reason:
            native.say_once(f"linear_w_a16 runs on the slow reference: {reason}")
        return _best(tokens, reason)
    if impl not in IMPLEMENTATIONS:
        raise KernelUnavailable(f"linear_w_a16 has no implementation '{impl}'; known: {', '.join(IMPLEMENTATIONS)}")
    if reason and impl != "reference":
        raise KernelUnavailable(f"linear_w_a16 '{impl}' cannot run: {reason}")
    return impl


def _best(tokens: int, reason: str) -> str:
    if reason:
        return "reference"
    return "native-lookup" if tokens <= LOOKUP_TOKENS else "native-decode"


def _lookup(x: Tensor, planes: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, columns: int) -> Tensor:
    bits, out, _ = planes.shape
    x, planes, scale = x.contiguous(), planes.contiguous(), scale.contiguous()
    zero = None if zero is None else zero.contiguous()
    y = torch.empty(x.shape[0], out)
    _run_lookup(x, planes, scale, zero, y, (x.shape[0], bits, out, columns, group_size))
    return y


def _run_lookup(
    x: Tensor, planes: Tensor, scale: Tensor, zero: Tensor | None, y: Tensor, sizes: tuple[int, int, int, int, int]
) -> None:
    """The native kernel on contiguous tensors; sizes: T, b, N, K, group_size."""
    zeros = 0 if zero is None else zero.data_ptr()
    native.loaded().linear_w_a16(x.data_ptr(), planes.data_ptr(), scale.data_ptr(), zeros, y.data_ptr(), *sizes)


def _decoded(x: Tensor, planes: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, columns: int) -> Tensor:
    out = planes.shape[1]
    block = max(1, min(DECODE_FLOATS // max(columns, 1), out))
    y, values = torch.empty(x.shape[0], out), _workspace(block * columns).view(block, columns)
    for begin in range(0, out, block):
        end = min(begin + block, out)
        part = values[: end - begin]
        _decode_rows(planes, scale, zero, group_size, part, begin)
        torch.mm(x, part.T, out=y[:, begin:end])
    return y


def _workspace(floats: int) -> Tensor:
    """Float32 scratch [floats] of this thread, kept between calls: fresh pages cost decoding 9 % more."""
    kept: Tensor | None = getattr(_local, "workspace", None)
    if kept is None or kept.numel() < floats:
        with torch.inference_mode(False):  # else its first use would decide who may write to it later
            kept = _local.workspace = torch.empty(max(floats, DECODE_FLOATS))
    return kept[:floats]


def _decode_rows(
    planes: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, values: Tensor, begin: int
) -> None:
    """Decode rows [begin, begin + len(values)) into contiguous float32 values [rows, K]."""
    bits, out, _ = planes.shape
    planes, scale = planes.contiguous(), scale.contiguous()
    zero = None if zero is None else zero.contiguous()
    addresses = (planes.data_ptr(), scale.data_ptr(), 0 if zero is None else zero.data_ptr(), values.data_ptr())
    end = begin + values.shape[0]
    native.loaded().decode_affine(*addresses, bits, out, values.shape[1], group_size, begin, end)


IMPLEMENTATIONS = {"native-lookup": _lookup, "native-decode": _decoded, "reference": reference.linear}

linear_op = torch.library.custom_op("anybit::linear_w_a16", _linear, mutates_args=())


@linear_op.register_fake
def _(x: Tensor, planes: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], planes.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 (the name is torch's)
    _, planes, scale, zero, ctx.group_size, ctx.columns, _ = inputs
    ctx.save_for_backward(planes, scale, zero)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    planes, scale, zero = ctx.saved_tensors
    weight = decode(planes, scale, zero, ctx.group_size, ctx.columns)
    return (grad @ weight.to(grad.dtype), None, None, None, None, None, None)


linear_op.register_autograd(_backward, setup_context=_save)
