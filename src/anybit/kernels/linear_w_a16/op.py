"""Weight-only linear: y = x W^T with W in bit-planes and x in float ("a16": activations are not quantized).

    native-lookup  few tokens: planes are used as they are, through tables (cpu.cpp, codebook.cpp)
    native-decode  many tokens: a block of rows is decoded, PyTorch multiplies
    reference      anything else

x is computed in float32 whatever its dtype; y has the dtype of x. For `native-lookup`, y[t] depends on x[t] alone, bit
for bit: not on the other tokens, not on the number of threads. `weight.py` says which weights there are.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from anybit.errors import FormatError, KernelUnavailable
from anybit.kernels import native
from anybit.kernels.linear_w_a16 import reference
from anybit.kernels.linear_w_a16.weight import Weight

# Beyond these tokens, decoding once is cheaper than looking up for every token (NOTES.md).
LOOKUP_TOKENS = {"affine": 12, "fractional": 12, "bipolar": 12, "binary_coded": 40, "codebook": 12}
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
    """`multiply` by an affine weight: x [..., K], planes uint8 [b, N, ceil(K/8)], scale float16 [N, G], zero uint8
    [N, G] or None (2^(b-1)); G = ceil(K / group_size), K = columns."""
    return multiply(x, Weight(planes, scale, zero, group_size, columns), impl)


def multiply(x: Tensor, weight: Weight, impl: str | None = None) -> Tensor:
    """x float [..., K] @ W^T as [..., N] in the dtype of x; differentiable in x. `impl` forces an implementation.

    Raises:
        FormatError: shapes or dtypes that do not fit together.
        KernelUnavailable: the forced `impl` cannot run here.
    """
    if _eager(x):
        return _multiply(x, weight, impl)
    tensors = (weight.planes, weight.first, weight.second)
    return linear_op(x, *tensors, weight.group_size, weight.columns, impl, weight.kind)


class Prepared:
    """`multiply` by one weight, checked once: a decode step makes hundreds of calls of some tens of microseconds."""

    def __init__(self, weight: Weight) -> None:
        """Errors of `multiply`."""
        weight.check()
        self._weight = weight
        self._shared = (
            not torch.compiler.is_compiling()
            and weight.columns > 0
            and weight.contiguous() is weight
            and not native.refusal(*weight.tensors)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] @ W^T as [..., N] in the dtype of x; differentiable in x."""
        rows, columns = self._weight.shape
        if (
            not self._shared
            or not _eager(x)
            or x.numel() > LOOKUP_TOKENS[self._weight.kind] * columns
            or x.dtype != torch.float32
            or x.shape[-1] != columns
            or not (x.is_cpu and x.is_contiguous())
        ):
            return multiply(x, self._weight)
        y = torch.empty(*x.shape[:-1], rows)
        self._weight.multiply(x, y)
        return y


def decode(weight: Weight) -> Tensor:
    """The weight as float32 [N, K], equal to its decoder in `formats` bit for bit."""
    weight.check()
    if native.refusal(*weight.tensors):
        return reference.decode(weight)
    values = torch.empty(weight.shape)
    weight.contiguous().decode_rows(values, 0)
    return values


def choose(tokens: int, *tensors: Tensor | None, kind: str = "affine") -> str:
    """The implementation that runs this many tokens by a weight of this kind on the device of these tensors."""
    return _best(tokens, kind, native.refusal(*tensors))


def check_weight(planes: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, columns: int) -> None:
    """Raise FormatError unless the parts describe one affine weight."""
    Weight(planes, scale, zero, group_size, columns).check()


def _eager(x: Tensor) -> bool:
    """Whether nobody is tracing or differentiating; then the dispatcher, dearer than a small kernel, is not needed."""
    if torch.compiler.is_compiling():
        return False
    return type(x) is Tensor and not (x.requires_grad and torch.is_grad_enabled())


def _multiply(x: Tensor, weight: Weight, impl: str | None) -> Tensor:
    weight.check()
    if x.shape[-1] != weight.columns or not x.is_floating_point():
        raise FormatError(f"x must be float [..., {weight.columns}], got {x.dtype} {tuple(x.shape)}")
    rows = x.reshape(-1, weight.columns)
    run = IMPLEMENTATIONS[_pick(impl, rows.shape[0], weight.kind, native.refusal(x, *weight.tensors))]
    return run(rows.float(), weight).to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def _pick(impl: str | None, tokens: int, kind: str, reason: str) -> str:
    """The forced implementation if it can run, else the best one; `reason` says why native ones cannot."""
    if impl is None:
        if reason:
            native.say_once(f"linear_w_a16 runs on the slow reference: {reason}")
        return _best(tokens, kind, reason)
    if impl not in IMPLEMENTATIONS:
        raise KernelUnavailable(f"linear_w_a16 has no implementation '{impl}'; known: {', '.join(IMPLEMENTATIONS)}")
    if reason and impl != "reference":
        raise KernelUnavailable(f"linear_w_a16 '{impl}' cannot run: {reason}")
    return impl


def _best(tokens: int, kind: str, reason: str) -> str:
    if reason:
        return "reference"
    return "native-lookup" if tokens <= LOOKUP_TOKENS[kind] else "native-decode"


def _lookup(x: Tensor, weight: Weight) -> Tensor:
    y = torch.empty(x.shape[0], weight.shape[0])
    if weight.columns == 0:
        return y.zero_()
    weight.contiguous().multiply(x.contiguous(), y)
    return y


def _decoded(x: Tensor, weight: Weight) -> Tensor:
    out, columns = weight.shape
    weight = weight.contiguous()
    block = max(1, min(DECODE_FLOATS // max(columns, 1), out))
    y, values = torch.empty(x.shape[0], out), _workspace(block * columns).view(block, columns)
    for begin in range(0, out, block):
        end = min(begin + block, out)
        part = values[: end - begin]
        weight.decode_rows(part, begin)
        torch.mm(x, part.T, out=y[:, begin:end])
    return y


def _workspace(floats: int) -> Tensor:
    """Float32 scratch [floats] of this thread, kept between calls: fresh pages cost decoding 9 % more."""
    kept: Tensor | None = getattr(_local, "workspace", None)
    if kept is None or kept.numel() < floats:
        with torch.inference_mode(False):  # else its first use would decide who may write to it later
            kept = _local.workspace = torch.empty(max(floats, DECODE_FLOATS))
    return kept[:floats]


IMPLEMENTATIONS = {"native-lookup": _lookup, "native-decode": _decoded, "reference": reference.linear}


def _from_parts(
    x: Tensor,
    planes: Tensor,
    first: Tensor,
    second: Tensor | None,
    group_size: int,
    columns: int,
    impl: str | None = None,
    kind: str = "affine",
) -> Tensor:
    return _multiply(x, Weight(planes, first, second, group_size, columns, kind), impl)


linear_op = torch.library.custom_op("anybit::linear_w_a16", _from_parts, mutates_args=())


@linear_op.register_fake
def _(x: Tensor, planes: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], planes.shape[1])


def _decode_parts(
    planes: Tensor, first: Tensor, second: Tensor | None, group_size: int, columns: int, kind: str
) -> Tensor:
    return decode(Weight(planes, first, second, group_size, columns, kind))


# An operator of its own, since gradients are traced too.
decode_op = torch.library.custom_op("anybit::linear_w_a16_decode", _decode_parts, mutates_args=())


@decode_op.register_fake
def _(planes: Tensor, first: Tensor, second: Tensor | None, group_size: int, columns: int, *_: object) -> Tensor:  # noqa: ARG001
    return first.new_empty(planes.shape[1], columns, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 (the name is torch's)
    ctx.save_for_backward(*inputs[1:4])
    ctx.rest = inputs[4:6] + inputs[7:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight = decode_op(*ctx.saved_tensors, *ctx.rest)
    return (grad @ weight.to(grad.dtype), *[None] * 7)


linear_op.register_autograd(_backward, setup_context=_save)
