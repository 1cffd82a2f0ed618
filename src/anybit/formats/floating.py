"""Small floats ExMy with a scale per group: value = scale[n, g] * float_of(code). Code bits: sign, exponent, mantissa.

E4M3 is the OCP "fn" format (no infinity, one NaN per sign, largest 448); E5M2 is IEEE-like (infinity and NaN exist,
largest
57344). Every other ExMy uses all its codes for numbers, as the OCP FP6 and FP4 formats do. Encoding saturates and
rounds to nearest, ties to even; it never makes an infinity or NaN.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor

from anybit.errors import FormatError
from anybit.formats.affine import group_reach
from anybit.formats.decoder import Form, Spec, full_precision_only, groups, per_column, to_scale


@dataclass(frozen=True)
class FloatType:
    """A float type of 1 + exponent + mantissa bits, 2 to 8 in all.

    Raises:
        FormatError: no exponent bit, or a total outside 2..8 bits.
    """

    exponent: int
    mantissa: int

    def __post_init__(self) -> None:
        if self.exponent < 1 or self.mantissa < 0 or self.bits > 8:
            raise FormatError(f"float type {self.name} must have an exponent and at most 8 bits with its sign")

    @classmethod
    def parse(cls, name: str) -> FloatType:
        """`"e4m3"` and the like."""
        found = re.fullmatch(r"e(\d)m(\d)", name)
        if not found:
            raise FormatError(f"float type '{name}' is not of the form e4m3")
        return cls(int(found[1]), int(found[2]))

    @property
    def name(self) -> str:
        """`e4m3` and the like."""
        return f"e{self.exponent}m{self.mantissa}"

    @property
    def bits(self) -> int:
        """Code width with the sign."""
        return 1 + self.exponent + self.mantissa

    @cached_property
    def magnitudes(self) -> Tensor:
        """float32 [2^(bits-1)]: the value of every non-negative code, ascending; NaN and infinity where the type has
        them."""
        bias = 2 ** (self.exponent - 1) - 1
        values = []
        for code in range(2 ** (self.bits - 1)):
            exponent, fraction = code >> self.mantissa, (code & ((1 << self.mantissa) - 1)) / 2**self.mantissa
            values.append((1 + fraction) * 2.0 ** (exponent - bias) if exponent else fraction * 2.0 ** (1 - bias))
        if (self.exponent, self.mantissa) == (4, 3):
            values[-1] = math.nan
        if (self.exponent, self.mantissa) == (5, 2):
            values[-4:] = [math.inf, math.nan, math.nan, math.nan]
        return torch.tensor(values)

    @property
    def largest(self) -> float:
        """The largest finite value."""
        return float(self.magnitudes[torch.isfinite(self.magnitudes)].max())

    def round(self, values: Tensor) -> Tensor:
        """Values float32 (any shape) to codes uint8 of the nearest number: ties to even, saturating."""
        finite = self.magnitudes[torch.isfinite(self.magnitudes)]
        borders = (finite[1:] + finite[:-1]) / 2
        size = values.abs().contiguous()
        code = torch.searchsorted(borders, size)
        # An exact tie lands on the lower code; when that one is odd, its even neighbour is one up.
        tie = (code < len(borders)) & (borders[code.clamp_max(len(borders) - 1)] == size)
        code = code + (tie & (code % 2 == 1))
        return (code + (torch.signbit(values) << (self.bits - 1))).to(torch.uint8)

    def value(self, codes: Tensor) -> Tensor:
        """Codes uint8 (any shape) to float32."""
        table = torch.cat([self.magnitudes, -self.magnitudes])
        return table[codes.long()]


@dataclass(frozen=True)
class Floating:
    """Small floats scaled per group.

    Attributes:
        type: the float type; its width is the code width.
        group_size: columns per group.
        scale: float16 [N, G], positive.
    """

    kind: ClassVar[str] = "float"
    type: FloatType
    group_size: int
    scale: Tensor

    @property
    def bits(self) -> int:
        """Code width."""
        return self.type.bits

    @classmethod
    def fit(cls, values: Tensor, type: FloatType, group_size: int) -> Floating:
        """The scale that maps max|values| of each group of values float32 [N, K] to the type's largest number."""
        return cls(type, group_size, to_scale(group_reach(values, group_size) / type.largest))

    @property
    def precisions(self) -> tuple[int, ...]:
        """The stored width alone."""
        return (self.bits,)

    def decode(self, codes: Tensor, bits: int | None = None) -> Tensor:
        """Codes uint8 [N, K] to float32 [N, K]."""
        full_precision_only(self.kind, self.bits, bits)
        return self.type.value(codes) * per_column(self.scale.float(), codes.shape[1], self.group_size)

    def encode(self, values: Tensor) -> Tensor:
        """Values float32 [N, K] to the nearest codes uint8 [N, K]."""
        return self.type.round(values / per_column(self.scale.float(), values.shape[1], self.group_size))

    def tensors(self) -> dict[str, Tensor]:
        """`scale`."""
        return {"scale": self.scale}

    def form(self) -> Form:
        """JSON metadata."""
        return {"kind": self.kind, "type": self.type.name, "bits": self.bits, "group_size": self.group_size}

    @classmethod
    def specs(cls, form: Form, shape: tuple[int, int]) -> dict[str, Spec]:
        """Shapes and dtypes of `tensors()`."""
        return {"scale": ((shape[0], groups(shape[1], form["group_size"])), torch.float16)}

    @classmethod
    def restore(cls, form: Form, tensors: Mapping[str, Tensor]) -> Self:
        """From saved metadata and tensors."""
        return cls(FloatType.parse(form["type"]), form["group_size"], tensors["scale"])
