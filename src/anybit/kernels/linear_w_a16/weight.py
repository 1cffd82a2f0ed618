"""What `linear_w_a16` multiplies by: bit-planes and the tensors that turn their codes into numbers, in one of five
kinds.

    affine        scale[n, g] * (code[n, k] - zero[n, g])                   first = scale, second = zero
    fractional    the same with zeros between codes: nested weights       first = scale, second = zero
    bipolar       scale[n, g] * (2 code[n, k] - (2^b - 1))                  first = scale
    binary_coded  offset[n, g] + sum_i alpha[n, g, i] * (2 bit_i[n, k] - 1)  first = alpha, second = offset
    codebook      table[n, code[n, k]]                                      first = table
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.errors import FormatError
from anybit.formats.affine import Affine
from anybit.formats.binary_coded import BinaryCoded
from anybit.formats.bipolar import Bipolar
from anybit.formats.codebook import Codebook
from anybit.formats.decoder import Decoder, groups
from anybit.formats.nested_affine import NestedAffine
from anybit.formats.planes import check_planes
from anybit.kernels import native

KINDS = ("affine", "fractional", "bipolar", "binary_coded", "codebook")


@dataclass(frozen=True)
class Weight:
    """A weight [N, K] of b bits; G = ceil(K / group_size).

    Attributes:
        planes: uint8 [b, N, ceil(K/8)], most significant first; padding bits are ignored.
        first: float16; scale [N, G], alpha [N, G, b] (entry i scales plane i) or table [N, 2^b], whose entries are finite.
        second: zero uint8 [N, G] (None: 2^(b-1)), fractional zero float16 [N, G], offset float16 [N, G] (None: 0), or None.
        group_size: columns per entry of `first`, 1..K; K for a codebook.
        columns: K.
        kind: one of KINDS.
    """

    planes: Tensor
    first: Tensor
    second: Tensor | None
    group_size: int
    columns: int
    kind: str = "affine"

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.planes.shape[1], self.columns

    @property
    def tensors(self) -> list[Tensor]:
        """Those that are there."""
        return [tensor for tensor in (self.planes, self.first, self.second) if tensor is not None]

    def check(self) -> None:
        """Raise FormatError unless the parts describe one weight."""
        check_planes(self.planes, self.columns)
        if self.kind not in KINDS:
            raise FormatError(f"no weight of kind '{self.kind}'; known: {', '.join(KINDS)}")
        if not 1 <= self.group_size <= max(self.columns, 1):
            raise FormatError(f"group_size must be 1 to {self.columns} (the columns), got {self.group_size}")
        bits, rows, _ = self.planes.shape
        table = (rows, groups(self.columns, self.group_size))
        if self.kind == "codebook":
            _check(self.first, "table", (rows, 2**bits), torch.float16)
        elif self.kind == "binary_coded":
            _check(self.first, "alpha", (*table, bits), torch.float16)
        else:
            _check(self.first, "scale", table, torch.float16)
        if self.second is not None and self.kind in ("bipolar", "codebook"):
            raise FormatError(f"a {self.kind} weight has one table and nothing beside it")
        if self.kind == "fractional":
            _check(torch.empty(0) if self.second is None else self.second, "zero", table, torch.float16)
        elif self.second is not None and self.kind == "affine":
            _check(self.second, "zero", table, torch.uint8)
        elif self.second is not None:
            _check(self.second, "offset", table, torch.float16)

    def contiguous(self) -> Weight:
        """The same with contiguous tensors, as native code reads them; itself if they are."""
        if all(tensor.is_contiguous() for tensor in self.tensors):
            return self
        second = None if self.second is None else self.second.contiguous()
        parts = (self.planes.contiguous(), self.first.contiguous(), second)
        return Weight(*parts, self.group_size, self.columns, self.kind)

    def decode_rows(self, values: Tensor, begin: int) -> None:
        """Rows [begin, begin + len(values)) into contiguous float32 values [rows, K]; the weight is contiguous, native."""
        decode = getattr(native.loaded(), f"decode_{self.kind}")
        decode(values.data_ptr(), begin, begin + values.shape[0], *self._addresses())

    def multiply(self, x: Tensor, y: Tensor) -> None:
        """Contiguous float32 y [T, N] = x [T, K] @ W^T by the native kernel; the weight is contiguous."""
        linear = getattr(native.loaded(), f"linear_w_a16_{self.kind}")
        linear(x.data_ptr(), y.data_ptr(), x.numel() // self.columns, *self._addresses())

    def _addresses(self) -> tuple[int, int, int, tuple[int, int, int, int]]:
        bits, rows, _ = self.planes.shape
        second = 0 if self.second is None else self.second.data_ptr()
        sizes = (bits, rows, self.columns, self.group_size)
        return self.planes.data_ptr(), self.first.data_ptr(), second, sizes


def of_decoder(planes: Tensor, decoder: Decoder, columns: int, bits: int | None = None) -> Weight | None:
    """The weight of planes uint8 [b, N, ceil(K/8)] under a decoder, read at one of its precisions (default: all planes);
    None for kinds that no kernel reads directly.

    Raises:
        FormatError: a width that the decoder does not offer.
    """
    bits, whole = decoder.bits if bits is None else bits, max(columns, 1)
    if bits not in decoder.precisions:
        raise FormatError(f"no {bits} bits in this {decoder.kind} weight; it holds {list(decoder.precisions)}")
    planes = planes[:bits]
    if isinstance(decoder, NestedAffine):
        return _fractional(planes, decoder, columns, bits)
    if isinstance(decoder, Affine):
        return Weight(planes, decoder.scale, decoder.zero, decoder.group_size, columns)
    if isinstance(decoder, Bipolar):
        return Weight(planes, decoder.scale, None, decoder.group_size, columns, "bipolar")
    if isinstance(decoder, BinaryCoded):
        offset = None if decoder.offsets is None else decoder.offsets[bits]
        return Weight(planes, decoder.alphas[bits], offset, decoder.group_size, columns, "binary_coded")
    if isinstance(decoder, Codebook):
        return Weight(planes, decoder.tables[bits], None, whole, columns, "codebook")
    return None


def _fractional(planes: Tensor, decoder: NestedAffine, columns: int, bits: int) -> Weight:
    """In steps of the planes that are read, one is 2^d steps of the stored codes, d planes being dropped. The zero then is an
    integer of at most 10 bits over 2^(d+1) and the scale moves by a power of two, so float16 holds both exactly."""
    scale, zero = decoder.grid(bits)
    step = 2 ** (decoder.bits - bits)
    moved, zero = scale * step, ((2 * zero.float() - (step - 1)) / (2 * step)).half()
    if not torch.compiler.is_compiling() and bool(moved.isinf().any()):
        raise FormatError(f"a scale of this weight is too large to read it at {bits} bits")
    return Weight(planes, moved, zero, decoder.group_size, columns, "fractional")


def _check(tensor: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype:
        kind = str(dtype).removeprefix("torch.")
        raise FormatError(f"{name} must be {kind} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
