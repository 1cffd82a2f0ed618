"""Linear by table look-up, without loss: weights of 1 to 4 bits, int8 activations.

    native     cpu.cpp
    reference  int64 arithmetic, PyTorch

Four activations have 16 subset sums; they are tabulated once per token as 16-bit integers, so four weight bits of a plane
cost one look-up and nothing is rounded. The sum of each group is exact, and floating point enters once per group:

    y[t, n] = sum_g (scale[n, g] x_scale[t]) float32(exact[t, n, g])    left to right, fused multiply-add

which is also what `linear_bits` computes, bit for bit. y depends on x[t] and row n alone. Building the tables is part of
the op. Groups are multiples of 32 columns, or a whole row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anybit.errors import FormatError, KernelUnavailable
from anybit.formats.planes import row_bytes
from anybit.kernels import native
from anybit.kernels.linear_bits.encoding import Encoding, twos_complement
from anybit.kernels.linear_bits.weight import CodedWeight, check_activations, check_reach
from anybit.kernels.linear_lut import reference

IMPLEMENTATIONS = ("native", "reference")
MAX_BITS = 4
MAX_COEFFICIENT = 127  # planes are weighted by a signed byte
ROWS, BYTES = 16, 4  # of one 64-byte line
INT8 = twos_complement(8)


@dataclass(frozen=True)
class LutWeight:
    """A CodedWeight repacked for this op, once.

    Attributes:
        lines: uint8 [B, C, p, 4, 16], B = ceil(N/16), C = ceil(K/32): byte [b, c, i, j, r] is plane byte 4c + j of row
            16b + r; padding is 0.
        coefficients: int8 [p].
        scale: float32 [B, G, 16], offset: int32 [B, G, 16], of CodedWeight; padding rows 0.
        reach: bound of the integers.
    """

    lines: Tensor
    coefficients: Tensor
    scale: Tensor
    offset: Tensor
    encoding: Encoding
    rows: int
    columns: int
    group_size: int
    reach: int


def prepare(weight: CodedWeight) -> LutWeight:
    """Repack; `unprepare` is the way back.

    Raises:
        FormatError: more than 4 planes, plane coefficients beyond +-127, groups not a multiple of 32 nor whole rows.
    """
    encoding, columns = weight.encoding, weight.columns
    if encoding.bits > MAX_BITS or max(map(abs, encoding.coefficients)) > MAX_COEFFICIENT:
        raise FormatError(
            f"linear_lut takes 1 to {MAX_BITS} planes with coefficients within +-{MAX_COEFFICIENT}, "
            f"got {encoding.coefficients}; use linear_bits"
        )
    if weight.group_size % 32 and weight.group_size < columns:
        raise FormatError(
            f"linear_lut needs groups of a multiple of 32 columns or whole rows, got group_size={weight.group_size}"
        )
    blocks, used = -(-weight.rows // ROWS), row_bytes(columns)
    chunks = -(-used // BYTES)
    padded = torch.zeros(encoding.bits, blocks * ROWS, chunks * BYTES, dtype=torch.uint8)
    padded[:, : weight.rows, :used] = weight.planes
    if columns % 8:
        padded[..., used - 1] &= (1 << columns % 8) - 1
    lines = padded.view(encoding.bits, blocks, ROWS, chunks, BYTES).permute(1, 3, 0, 4, 2).contiguous()
    coefficients = torch.tensor(encoding.coefficients, dtype=torch.int8)
    scale, offset = (_to_blocks(table, blocks) for table in (weight.scale, weight.offset))
    sizes = (weight.rows, columns, weight.group_size)
    return LutWeight(lines, coefficients, scale, offset, encoding, *sizes, weight.reach())


def unprepare(weight: LutWeight) -> CodedWeight:
    """The canonical weight again, byte for byte (padding bits 0)."""
    blocks, chunks, bits = weight.lines.shape[:3]
    padded = weight.lines.permute(2, 0, 4, 1, 3).reshape(bits, blocks * ROWS, chunks * BYTES)
    planes = padded[:, : weight.rows, : row_bytes(weight.columns)].contiguous()
    scale, offset = (
        table.transpose(1, 2).flatten(0, 1)[: weight.rows].contiguous() for table in (weight.scale, weight.offset)
    )
    return CodedWeight(planes, weight.columns, weight.encoding, weight.group_size, scale, offset)


def linear(x: Tensor, x_scale: Tensor, weight: LutWeight, impl: str | None = None) -> Tensor:
    """float32 [T, N], see above.

    Args:
        x: int8 [T, K], any of -128..127.
        x_scale: float32 [T].
        weight: from `prepare`.
        impl: force one of the implementations above.

    Raises:
        FormatError: shapes or dtypes that do not fit, or sums that may exceed 32 bits.
        KernelUnavailable: the forced `impl` cannot run here.
    """
    if torch.compiler.is_compiling():
        tensors = (weight.lines, weight.coefficients, weight.scale, weight.offset)
        numbers = (list(weight.encoding.coefficients), weight.rows, weight.columns, weight.group_size, weight.reach)
        return linear_op(x, x_scale, *tensors, *numbers, impl)
    _check(x, x_scale, weight)
    if choose(impl, x, x_scale, weight.lines) == "reference":
        return reference.linear(x, x_scale, unprepare(weight))
    return linear_unchecked(x, x_scale, weight)


def linear_unchecked(x: Tensor, x_scale: Tensor, weight: LutWeight) -> Tensor:
    """`linear`, native, for callers that have checked shapes and dtypes themselves."""
    y = torch.empty(x.shape[0], weight.rows)
    _run(x, x_scale, weight, y.data_ptr(), 0)
    return y


def integers(x: Tensor, weight: LutWeight, impl: str | None = None) -> Tensor:
    """The exact sums int32 [T, N, G]; arguments and errors of `linear`."""
    _check(x, None, weight)
    if choose(impl, x, weight.lines) == "reference":
        return reference.integers(x, unprepare(weight)).int()
    out = torch.empty(x.shape[0], weight.rows, weight.scale.shape[1], dtype=torch.int32)
    _run(x, None, weight, 0, out.data_ptr())
    return out


def choose(impl: str | None, *tensors: Tensor) -> str:
    """The implementation that runs: the forced one if it can, else the best."""
    if impl not in (None, *IMPLEMENTATIONS):
        raise KernelUnavailable(f"linear_lut has no implementation '{impl}'; known: {', '.join(IMPLEMENTATIONS)}")
    reason = native.refusal(*tensors)
    if impl == "native" and reason:
        raise KernelUnavailable(f"linear_lut 'native' cannot run: {reason}")
    if impl is None and reason:
        native.say_once(f"linear_lut runs on the slow reference: {reason}")
    return impl or ("reference" if reason else "native")


def _to_blocks(table: Tensor, blocks: int) -> Tensor:
    """[N, G] to [B, G, 16], padding rows 0."""
    padded = torch.nn.functional.pad(table, (0, 0, 0, blocks * ROWS - table.shape[0]))
    return padded.view(blocks, ROWS, -1).transpose(1, 2).contiguous()


def _check(x: Tensor, x_scale: Tensor | None, weight: LutWeight) -> None:
    check_activations(x, x_scale, weight.columns)
    if x.dtype != torch.int8:
        raise FormatError(f"linear_lut takes int8 activations, got {x.dtype}; use linear_bits")
    check_reach(weight.group_size, weight.reach, INT8)


def _run(x: Tensor, x_scale: Tensor | None, w: LutWeight, y: int, integers: int) -> None:
    """The native kernel; y and integers are addresses, the result goes to the one that is not 0."""
    x, x_scale = x.contiguous(), None if x_scale is None else x_scale.contiguous()
    scales = 0 if x_scale is None else x_scale.data_ptr()
    weight = (w.lines.data_ptr(), w.coefficients.data_ptr(), w.offset.data_ptr(), w.scale.data_ptr())
    sizes = (w.encoding.bits, w.rows, w.columns, w.group_size, w.scale.shape[1], x.shape[0])
    native.loaded().linear_lut(x.data_ptr(), scales, weight, sizes, y, integers)


def _linear(
    x: Tensor,
    x_scale: Tensor,
    lines: Tensor,
    coefficients: Tensor,
    scale: Tensor,
    offset: Tensor,
    numbers: list[int],
    rows: int,
    columns: int,
    group_size: int,
    reach: int,
    impl: str | None = None,
) -> Tensor:
    """`linear` as a compiled graph sees it: the parts of LutWeight one by one; numbers: the coefficients."""
    sizes = (rows, columns, group_size, reach)
    return linear(x, x_scale, LutWeight(lines, coefficients, scale, offset, Encoding(tuple(numbers)), *sizes), impl)


linear_op = torch.library.custom_op("anybit::linear_lut", _linear, mutates_args=())


@linear_op.register_fake
def _(*args: Any) -> Tensor:
    x, x_scale, rows = args[0], args[1], args[7]
    return x_scale.new_empty(x.shape[0], rows)
