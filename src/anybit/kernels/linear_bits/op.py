"""Bit-serial linear: any width times any width, by AND and popcount of bit-planes.

    native     cpu.cpp
    reference  int64 arithmetic, PyTorch

x is integer codes of 1 to 8 bits; the weight is planes of 1 to 8 bits. What the bits mean is free on both sides
(`encoding.py`): unsigned, two's complement, bipolar, zero points, any integer per plane. The sum of each group is exact;
floating point enters once per group:

    y[t, n] = sum_g (scale[n, g] x_scale[t]) float32(exact[t, n, g])    left to right, fused multiply-add

so y depends on x[t] and row n alone, bit for bit. Packing x into planes is part of the op.

Groups are multiples of 64 columns, or a whole row. A group of 32 is refused: popcounts come in lanes of 64 bits, so two
groups would share a lane and every AND would have to be done twice, at half the speed; `linear_lut` takes groups of 32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.errors import FormatError, KernelUnavailable
from anybit.formats.planes import row_bytes
from anybit.kernels import native
from anybit.kernels.linear_bits import reference
from anybit.kernels.linear_bits.encoding import Encoding
from anybit.kernels.linear_bits.weight import CodedWeight, check_activations, check_reach

IMPLEMENTATIONS = ("native", "reference")
LINE = 64  # bytes: plane rows are padded to 512 bits


@dataclass(frozen=True)
class BitWeight:
    """A CodedWeight repacked for this op, once.

    Attributes:
        words: uint8 [N, p, stride], the p plane rows of each weight row side by side, zero-padded to 512 bits.
        sums: int32 [N, G], sums of the codes.
        scale, offset: of CodedWeight.
        reach: bound of the integers.
    """

    words: Tensor
    sums: Tensor
    scale: Tensor
    offset: Tensor
    encoding: Encoding
    columns: int
    group_size: int
    reach: int

    @property
    def rows(self) -> int:
        """N."""
        return int(self.words.shape[0])


def prepare(weight: CodedWeight) -> BitWeight:
    """Repack; `unprepare` is the way back.

    Raises:
        FormatError: groups that are neither multiples of 64 nor whole rows.
    """
    if weight.group_size % 64 and weight.group_size < weight.columns:
        raise FormatError(
            f"linear_bits needs groups of a multiple of 64 columns or whole rows, got group_size={weight.group_size}"
        )
    used = row_bytes(weight.columns)
    words = torch.zeros(weight.rows, weight.encoding.bits, -(-used // LINE) * LINE, dtype=torch.uint8)
    words[..., :used] = weight.planes.transpose(0, 1)
    if weight.columns % 8:
        words[..., used - 1] &= (1 << weight.columns % 8) - 1
    scale, offset, encoding = weight.scale, weight.offset, weight.encoding
    return BitWeight(
        words, weight.code_sums(), scale, offset, encoding, weight.columns, weight.group_size, weight.reach()
    )


def unprepare(weight: BitWeight) -> CodedWeight:
    """The canonical weight again, byte for byte (padding bits 0)."""
    planes = weight.words[..., : row_bytes(weight.columns)].transpose(0, 1).contiguous()
    return CodedWeight(planes, weight.columns, weight.encoding, weight.group_size, weight.scale, weight.offset)


def linear(x: Tensor, x_scale: Tensor, weight: BitWeight, encoding: Encoding, impl: str | None = None) -> Tensor:
    """float32 [T, N], see above.

    Args:
        x: int8 codes in -2^(q-1)..2^(q-1)-1 or uint8 codes in 0..2^q-1, [T, K]; their low q bits are the planes.
        x_scale: float32 [T].
        weight: from `prepare`.
        encoding: of x, q planes.
        impl: force one of the implementations above.

    Raises:
        FormatError: shapes, dtypes or codes that do not fit, or sums that may exceed 32 bits.
        KernelUnavailable: the forced `impl` cannot run here.
    """
    if torch.compiler.is_compiling():
        tensors = (weight.words, weight.sums, weight.scale, weight.offset)
        numbers = (list(weight.encoding.coefficients), list(encoding.coefficients), encoding.offset)
        return linear_op(x, x_scale, *tensors, *numbers, weight.columns, weight.group_size, weight.reach, impl)
    check_activations(x, x_scale, weight.columns)
    check_reach(weight.group_size, weight.reach, encoding)
    if choose(impl, x, x_scale, weight.words) == "reference":
        return reference.linear(reference.activation_values(x, encoding), x_scale, unprepare(weight))
    return linear_unchecked(x, x_scale, weight, encoding)


def linear_unchecked(x: Tensor, x_scale: Tensor, weight: BitWeight, encoding: Encoding) -> Tensor:
    """`linear`, native, for callers that have checked shapes and dtypes themselves; codes are checked all the same."""
    y = torch.empty(x.shape[0], weight.rows)
    _run(x, x_scale, weight, encoding, y.data_ptr(), 0)
    return y


def integers(x: Tensor, weight: BitWeight, encoding: Encoding, impl: str | None = None) -> Tensor:
    """The exact sums int32 [T, N, G]; arguments and errors of `linear`."""
    check_activations(x, None, weight.columns)
    check_reach(weight.group_size, weight.reach, encoding)
    if choose(impl, x, weight.words) == "reference":
        return reference.integers(reference.activation_values(x, encoding), unprepare(weight)).int()
    out = torch.empty(x.shape[0], *weight.sums.shape, dtype=torch.int32)
    _run(x, None, weight, encoding, 0, out.data_ptr())
    return out


def choose(impl: str | None, *tensors: Tensor) -> str:
    """The implementation that runs: the forced one if it can, else the best."""
    if impl not in (None, *IMPLEMENTATIONS):
        raise KernelUnavailable(f"linear_bits has no implementation '{impl}'; known: {', '.join(IMPLEMENTATIONS)}")
    reason = native.refusal(*tensors)
    if impl == "native" and reason:
        raise KernelUnavailable(f"linear_bits 'native' cannot run: {reason}")
    if impl is None and reason:
        native.say_once(f"linear_bits runs on the slow reference: {reason}")
    return impl or ("reference" if reason else "native")


def _run(x: Tensor, x_scale: Tensor | None, w: BitWeight, encoding: Encoding, y: int, integers: int) -> None:
    """The native kernel; y and integers are addresses, the result goes to the one that is not 0."""
    x, x_scale = x.contiguous(), None if x_scale is None else x_scale.contiguous()
    scales = 0 if x_scale is None else x_scale.data_ptr()
    weight = (w.words.data_ptr(), w.offset.data_ptr(), w.sums.data_ptr(), w.scale.data_ptr())
    sizes = (w.rows, w.columns, w.words.shape[2] // 8, w.group_size, w.sums.shape[1], x.shape[0])
    token = (x.data_ptr(), x.dtype == torch.int8, scales, encoding.coefficients, encoding.offset)
    if not native.loaded().linear_bits(*token, weight, w.encoding.coefficients, sizes, y, integers):
        reference.activation_values(x, encoding)  # raises, naming the codes


def _linear(
    x: Tensor,
    x_scale: Tensor,
    words: Tensor,
    sums: Tensor,
    scale: Tensor,
    offset: Tensor,
    coefficients: list[int],
    x_coefficients: list[int],
    x_offset: int,
    columns: int,
    group_size: int,
    reach: int,
    impl: str | None = None,
) -> Tensor:
    """`linear` as a compiled graph sees it: the parts of BitWeight and of the two encodings one by one."""
    weight = BitWeight(words, sums, scale, offset, Encoding(tuple(coefficients)), columns, group_size, reach)
    return linear(x, x_scale, weight, Encoding(tuple(x_coefficients), x_offset), impl)


linear_op = torch.library.custom_op("anybit::linear_bits", _linear, mutates_args=())


@linear_op.register_fake
def _(x: Tensor, x_scale: Tensor, words: Tensor, *_: object) -> Tensor:
    return x_scale.new_empty(x.shape[0], words.shape[0])
