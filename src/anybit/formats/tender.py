"""Tender activations (arXiv 2406.12930, ISCA 2024): channels in groups whose scales are powers of two apart.

x[t, k] is about scale[t] * code[t, k] * 2^shift[k] + bias[k]: one scale a token (or one for all), one shift a channel. Sums of
products of different groups differ by shifts alone, so they are added up in integers and scaled once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from anybit.errors import FormatError
from anybit.formats.codes import Codes, steps, without
from anybit.formats.decoder import Spec

MOST_GROUPS = 24
"""Shifted codes of 8 bits stay within 32 bits."""


@dataclass(frozen=True)
class TenderCodes(Codes):
    """Codes of one scale a token, and what each channel does to them.

    Attributes:
        shift: uint8 [K].
        bias: float32 [K], or None.
    """

    shift: Tensor
    bias: Tensor | None

    def shifted(self) -> Tensor:
        """int32 [T, K], codes * 2^shift."""
        return self.codes.int() << self.shift.int()

    def values(self) -> Tensor:
        """The numbers the codes stand for, float32 [T, K]."""
        found = self.shifted().float() * self.scale
        return found if self.bias is None else found + self.bias


@dataclass(frozen=True)
class TenderActivations:
    """Integers of `bits` bits with a shift in 0..groups-1 per channel, read from `input_shift` uint8 [K].

    bias     `input_bias` float32 [K], the middle of each channel's range, is taken off first.
    static   the smallest group's scale is `input_scale` float32 [1]; otherwise it is the token's own, max |x - bias| / 2^shift
             over its channels / (2^(bits-1) - 1), and no token saturates.

    code = round((x - bias) / (scale 2^shift)), ties to even, in -2^(bits-1)..2^(bits-1)-1.

    One table serves every position. The paper has one for each 256 positions of a sequence, which a decoder that continues, packs
    or batches sequences would have to look up token by token; here the token's own scale does that work.
    """

    kind: ClassVar[str] = "tender"
    bits: int = 8
    groups: int = 8
    static: bool = False
    bias: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise FormatError(f"activations have 2 to 8 bits, got {self.bits}")
        if not 1 <= self.groups <= MOST_GROUPS:
            raise FormatError(f"tender activations have 1 to {MOST_GROUPS} groups of channels, got {self.groups}")

    def columns_per_group(self, columns: int) -> int:
        """The row: shifts are not scales."""
        return columns

    def encode(self, x: Tensor, tensors: Mapping[str, Tensor], bypass: Tensor | None = None) -> TenderCodes:
        """See `ActivationSpec`."""
        shift, top = tensors["input_shift"], 2 ** (self.bits - 1)
        bias = tensors["input_bias"] if self.bias else None
        centred = without(x if bias is None else x - bias, bypass, 0.0)
        small = torch.ldexp(centred, -shift.int())
        if self.static:
            scale = tensors["input_scale"].expand(len(x), -1)
            factor = 1 / scale
        else:
            scale, factor = steps(small.abs().amax(1, keepdim=True), top - 1)
        codes = (small * factor).round().nan_to_num(0.0).clamp(-top, top - 1).to(torch.int8)
        return TenderCodes(codes, scale, None, x.shape[1], shift, bias)

    def specs(self, columns: int) -> dict[str, Spec]:
        """`input_shift`, and `input_bias` and `input_scale` where there are any."""
        found: dict[str, Spec] = {"input_shift": ((columns,), torch.uint8)}
        if self.bias:
            found["input_bias"] = ((columns,), torch.float32)
        return found | ({"input_scale": ((1,), torch.float32)} if self.static else {})

    def form(self) -> dict[str, Any]:
        """JSON metadata."""
        return {"kind": self.kind, **self.__dict__}

    @classmethod
    def restore(cls, form: Mapping[str, Any]) -> Self:
        """From saved metadata."""
        return cls(**{key: value for key, value in form.items() if key != "kind"})
