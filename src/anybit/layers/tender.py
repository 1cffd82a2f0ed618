"""A layer's product where channels of its input are powers of two apart (`formats/tender.py`), exact in integers.

    A[t, n] = sum_k (code[t, k] << shift[k]) weight[n, k]        y = scale[t] scale[n] A + bias W^T

Three ways to the same A:
    F1  shift the codes, multiply once. Shifted codes that leave int8 are written in digits of base 256 (-128..127), one int8
        product each: `TenderProduct`, on the integer kernel.
    F2  `segmented`: channels sorted into segments whose relative shifts fit int8, the sum shifted between segments.
    F3  `shift_accumulate`: the paper's hardware, one group after the other, the sum doubled in between.

The bias meets the quantized weight, as everything else does; the paper's emulation multiplies it with the original one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from anybit.formats.affine import Affine
from anybit.formats.bipolar import Bipolar
from anybit.formats.tender import TenderActivations, TenderCodes
from anybit.formats.terms import CodeTerm, Term
from anybit.kernels.linear_side import op as linear_side
from anybit.kernels.linear_w_a8 import op as linear_w_a8
from anybit.kernels.quantize_activations.encode import laid_out
from anybit.layers.integer import IntegerProduct

LARGEST = 2**31 - 1


class TenderProduct(IntegerProduct):
    """x float32 [T, K] -> [T, N] through F1."""

    def __init__(self, terms: Sequence[Term], spec: TenderActivations, tensors: Mapping[str, Tensor]) -> None:
        """`tensors` are those of `spec`; raises FormatError for what `integer.refusal` names."""
        super().__init__(terms, spec, tensors)
        (term,) = [term for term in terms if isinstance(term, CodeTerm)]
        shift = tensors["input_shift"]
        self._digits = digits_needed(shift, spec.bits)
        if self._digits > 1:
            self._scale, self._zero = doubled_grid(term)
            self._sum = accumulator(shift, spec.bits, int(doubled_reach(term.decoder.bits, self._zero)))
        self._constant = term.dense() @ tensors["input_bias"] if spec.bias else None

    def __call__(self, x: Tensor) -> Tensor:
        """float32 [T, N]; a token's result depends on its row alone, bit for bit."""
        codes = self._spec.encode(x, self._tensors, self._bypass)
        assert isinstance(codes, TenderCodes)
        parts = [self._part(part, codes.scale) for part in digits(codes.shifted(), self._digits)]
        if len(parts) == 1:
            y = linear_w_a8.linear_quantized(parts[0], self._weight)
        else:
            y = ((self._integers(parts).double() * self._scale).sum(1) * codes.scale).float()
        if self._side is not None and self._bypass is not None:
            linear_side.add_(y, x[:, self._bypass.long()].contiguous(), self._side)
        y = self._with_low_rank(y, x)
        return y if self._constant is None else y + self._constant

    def _part(self, codes: Tensor, scale: Tensor) -> linear_w_a8.Quantized:
        return linear_w_a8.Quantized(*laid_out(codes, scale, codes.shape[1], self._weight.group_size))

    def _integers(self, parts: Sequence[linear_w_a8.Quantized]) -> Tensor:
        """Twice the exact sums A of each group of weights, [T, G, N]."""
        total = torch.zeros((), dtype=self._sum)
        for part in reversed(parts):  # the highest digit first
            sums = linear_w_a8.sums(part, self._weight).to(self._sum)
            total = total * 256 + (2 * sums - part.sums.to(self._sum)[:, :, None] * self._zero.to(self._sum))
        return total


def doubled_grid(term: CodeTerm) -> tuple[Tensor, Tensor]:
    """Scale float64 [G, N] and zero int64 [G, N] with value = scale (2 code - zero): the zero of a bipolar grid is a half."""
    grid = term.decoder
    if isinstance(grid, Bipolar):
        return grid.scale.double().t(), torch.full_like(grid.scale.t(), 2**grid.bits - 1, dtype=torch.int64)
    assert isinstance(grid, Affine), "others are refused"
    zero = torch.full_like(grid.scale, 2.0 ** (grid.bits - 1)) if grid.zero is None else grid.zero
    return grid.scale.double().t() / 2, 2 * zero.to(torch.int64).t()


def doubled_reach(bits: int, zero: Tensor) -> Tensor:
    """The largest |2 code - zero| that codes of `bits` bits can make."""
    return torch.maximum(zero.abs(), (2 * (2**bits - 1) - zero).abs()).max()


def bound(shift: Tensor, bits: int, reach: int) -> int:
    """The largest |sum| that codes of `bits` bits, shifted by shift uint8 [K], and weights up to `reach` can make."""
    return 2 ** (bits - 1) * reach * int((1 << shift.to(torch.int64)).sum())


def accumulator(shift: Tensor, bits: int, reach: int) -> torch.dtype:
    """int32 where no sum can leave it, else int64."""
    return torch.int32 if bound(shift, bits, reach) <= LARGEST else torch.int64


def digits_needed(shift: Tensor, bits: int) -> int:
    """How many digits of base 256, each -128..127, hold every code of `bits` bits after its shift: 1 means int8."""
    most = (2 ** (bits - 1) - 1) << int(shift.max())
    return next(n for n in range(1, 5) if most <= 127 * (256**n - 1) // 255)


def digits(values: Tensor, count: int) -> list[Tensor]:
    """Values int32 as `count` digits int8, the lowest first: sum of digit[i] 256^i."""
    found = []
    for _ in range(count):
        low = ((values + 128) & 255) - 128
        found.append(low.to(torch.int8))
        values = (values - low) >> 8
    return found


def segmented(codes: Tensor, shift: Tensor, weight: Tensor, bits: int) -> Tensor:
    """F2: A int64 [T, N] from codes int8 [T, K], shift uint8 [K] and weights int64 [N, K]. Channels whose shifts lie within
    9 - bits of each other share a segment: there a shifted code still fits int8."""
    width = 9 - bits
    total = torch.zeros(len(codes), len(weight), dtype=torch.int64)
    for segment in range(int(shift.max()) // width, -1, -1):
        inside = (shift // width == segment).nonzero()[:, 0]
        relative = shift[inside].to(torch.int64) - segment * width
        shifted = codes[:, inside].to(torch.int64) << relative
        total = (total << width) + shifted @ weight[:, inside].t()
    return total


def shift_accumulate(codes: Tensor, shift: Tensor, weight: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    """F3: A [T, N] in `dtype` (int32 wraps around, as hardware does), arguments as for `segmented`."""
    total = torch.zeros(len(codes), len(weight), dtype=dtype)
    for group in range(int(shift.max()), -1, -1):
        inside = (shift == group).nonzero()[:, 0]
        total = (total << 1) + codes[:, inside].to(dtype) @ weight[:, inside].t().to(dtype)
    return total
