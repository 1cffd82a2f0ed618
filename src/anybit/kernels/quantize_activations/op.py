"""Activations as signed bytes for integer kernels, optionally of an RMSNorm or a gated activation.

A group is `group_size` columns of one token (a multiple of 32), or the whole row. In float32, with `amax` the group's
largest magnitude:

    scale = amax / 127        code = round(y * (127 / amax)), ties to even        sum = exact sum of the codes

so y is about scale * code, and code is in -127..127. A group with amax < 2^-100 has scale 0 and codes 0; a group that
holds a NaN or an infinity has scale NaN and codes 0, so whatever is multiplied by it becomes NaN instead of a plausible
number. A token's result depends on its row alone, bit for bit: not on the other tokens, on threads, or on the
instruction set (native). `native` and `reference` agree bit for bit on `quantize`, else to rounding.

Codes come as [T, stride], `stride` being K rounded up to an odd number of 64s, zeros beyond K: the form integer
kernels read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anybit.errors import FormatError, KernelUnavailable
from anybit.formats.decoder import groups
from anybit.kernels import native
from anybit.kernels.quantize_activations import reference

IMPLEMENTATIONS = ("native", "reference")
ACTIVATIONS = ("silu", "gelu_tanh")
LONGEST_GROUP = (1 << 24) // 127  # sums of longer groups would not be exact in float32

Quantized = tuple[Tensor, Tensor, Tensor]  # codes int8 [T, stride], scale float32 [T, G], sums float32 [T, G]


def quantize(x: Tensor, group_size: int, impl: str | None = None) -> Quantized:
    """x float32 [T, K] to (codes int8 [T, stride], scale float32 [T, G], sums float32 [T, G]), G = ceil(K / group_size).

    Raises:
        FormatError: x is not float32 [T, K], or group_size is neither a multiple of 32 nor at least K.
        KernelUnavailable: the forced `impl` cannot run here.
    """
    return (quantize_op if torch.compiler.is_compiling() else _quantize)(x, group_size, impl)


def _quantize(x: Tensor, group_size: int, impl: str | None = None) -> Quantized:
    _check(x, group_size)
    if _choose(impl, x) == "reference":
        return reference.quantize(x, group_size)
    tokens, columns = x.shape
    x, (codes, scale, sums) = x.contiguous(), _empty(tokens, columns, group_size)
    outputs = (codes.data_ptr(), scale.data_ptr(), sums.data_ptr())
    native.loaded().quantize_rows(x.data_ptr(), *outputs, tokens, columns, group_size)
    return codes, scale, sums


def rms_norm_quantize(
    x: Tensor, weight: Tensor | None, plus_one: bool, eps: float, group_size: int, impl: str | None = None
) -> Quantized:
    """`quantize` of x / sqrt(mean(x^2) + eps) * weight (1 + weight with `plus_one`, Gemma).

    weight is float32 [K], or None. A row whose mean square is NaN or overflows is NaN everywhere.
    Errors as `quantize`.
    """
    return _quantize(rms_norm(x, weight, plus_one, eps, impl), group_size, impl)


def gate_quantize(gate_up: Tensor, activation: str, group_size: int, impl: str | None = None) -> Quantized:
    """`quantize` of act(gate) * up, gate_up float32 [T, 2F] holding F gates, then F ups; the activation is `silu` or
    `gelu_tanh`.

    Native values are within 1e-6 relative of the exact ones (down to e^-87; beyond, absolute). Errors as `quantize`.
    """
    return _quantize(gate(gate_up, activation, impl), group_size, impl)


def rms_norm(x: Tensor, weight: Tensor | None, plus_one: bool, eps: float, impl: str | None = None) -> Tensor:
    """What `rms_norm_quantize` quantizes: float32 [T, K]."""
    _check(x, x.shape[-1])
    _check_weight(x, weight)
    if _choose(impl, x, weight) == "reference":
        return reference.rms_norm(x, weight, plus_one, eps)
    x, weight = x.contiguous(), None if weight is None else weight.contiguous()
    y = torch.empty_like(x)
    native.loaded().rms_norm_rows(x.data_ptr(), _address(weight), plus_one, eps, y.data_ptr(), *x.shape)
    return y


def gate(gate_up: Tensor, activation: str, impl: str | None = None) -> Tensor:
    """What `gate_quantize` quantizes: float32 [T, F]."""
    columns = _check_gate(gate_up, activation)
    if _choose(impl, gate_up) == "reference":
        return reference.gate(gate_up, activation)
    gate_up = gate_up.contiguous()
    y = torch.empty(gate_up.shape[0], columns)
    native.loaded().gate_rows(gate_up.data_ptr(), activation == "gelu_tanh", y.data_ptr(), *y.shape)
    return y


def _empty(tokens: int, columns: int, group_size: int) -> Quantized:
    table = (tokens, groups(columns, group_size))
    codes = torch.empty(tokens, reference.stride(columns), dtype=torch.int8)
    return codes, torch.empty(table), torch.empty(table)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _check(x: Tensor, group_size: int) -> None:
    columns = x.shape[-1]
    if x.dtype != torch.float32 or x.ndim != 2 or not columns:
        raise FormatError(f"activations must be float32 [T, K] with K > 0, got {x.dtype} {tuple(x.shape)}")
    if group_size < columns and (group_size < 1 or group_size % 32):
        raise FormatError(f"group_size must be a multiple of 32 or at least {columns} (the row), got {group_size}")
    if min(group_size, columns) > LONGEST_GROUP:
        raise FormatError(f"a group may have at most {LONGEST_GROUP} columns, got {min(group_size, columns)}")


def _check_weight(x: Tensor, weight: Tensor | None) -> None:
    if weight is not None and (weight.dtype != torch.float32 or weight.shape != x.shape[-1:]):
        raise FormatError(f"weight must be float32 [{x.shape[-1]}], got {weight.dtype} {tuple(weight.shape)}")


def _check_gate(gate_up: Tensor, activation: str) -> int:
    if activation not in ACTIVATIONS:
        raise FormatError(f"no activation '{activation}'; known: {', '.join(ACTIVATIONS)}")
    if gate_up.dtype != torch.float32 or gate_up.ndim != 2 or gate_up.shape[1] % 2 or not gate_up.shape[1]:
        raise FormatError(f"gate_up must be float32 [T, 2F], got {gate_up.dtype} {tuple(gate_up.shape)}")
    return gate_up.shape[1] // 2


def _choose(impl: str | None, *tensors: Tensor | None) -> str:
    if impl not in (None, *IMPLEMENTATIONS):
        raise KernelUnavailable(
            f"quantize_activations has no implementation '{impl}'; known: {', '.join(IMPLEMENTATIONS)}"
        )
    reason = native.refusal(*tensors)
    if impl == "native" and reason:
        raise KernelUnavailable(f"quantize_activations 'native' cannot run: {reason}")
    return impl or ("reference" if reason else "native")


quantize_op = torch.library.custom_op("anybit::quantize_activations", _quantize, mutates_args=())


@quantize_op.register_fake
def _(x: Tensor, group_size: int, impl: str | None = None) -> Quantized:  # noqa: ARG001 (the names are the schema's)
    tokens, columns = x.shape
    table = (tokens, groups(columns, group_size))
    codes = x.new_empty(tokens, reference.stride(columns), dtype=torch.int8)
    return codes, x.new_empty(table), x.new_empty(table)
