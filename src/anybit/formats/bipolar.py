"""Bipolar integers: value = scale[n, g] * (2 code - (2^b - 1)), the odd grid; 0 is not representable, signs are
balanced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from anybit.formats.affine import group_reach
from anybit.formats.decoder import Form, Spec, full_precision_only, groups, per_column, to_scale


@dataclass(frozen=True)
class Bipolar:
    """Odd integers in -(2^b-1)..2^b-1 with one scale per group.

    Attributes:
        bits: code width, 1..8.
        group_size: columns per group.
        scale: float16 [N, G], positive.
    """

    kind: ClassVar[str] = "bipolar"
    bits: int
    group_size: int
    scale: Tensor

    @classmethod
    def fit(cls, values: Tensor, bits: int, group_size: int) -> Bipolar:
        """The grid whose outermost levels are +-max|values| of each group of values float32 [N, K]."""
        return cls(bits, group_size, to_scale(group_reach(values, group_size) / (2**bits - 1)))

    @property
    def precisions(self) -> tuple[int, ...]:
        """The stored width alone."""
        return (self.bits,)

    def decode(self, codes: Tensor, bits: int | None = None) -> Tensor:
        """Codes uint8 [N, K] to float32 [N, K]."""
        full_precision_only(self.kind, self.bits, bits)
        return (codes.float() * 2 - (2**self.bits - 1)) * per_column(
            self.scale.float(), codes.shape[1], self.group_size
        )

    def encode(self, values: Tensor) -> Tensor:
        """Values float32 [N, K] to the nearest codes uint8 [N, K]; ties to even, out of range saturates."""
        steps = 2**self.bits - 1
        scaled = values / per_column(self.scale.float(), values.shape[1], self.group_size)
        return ((scaled + steps) / 2).round().clamp(0, steps).to(torch.uint8)

    def tensors(self) -> dict[str, Tensor]:
        """`scale`."""
        return {"scale": self.scale}

    def form(self) -> Form:
        """JSON metadata."""
        return {"kind": self.kind, "bits": self.bits, "group_size": self.group_size}

    @classmethod
    def specs(cls, form: Form, shape: tuple[int, int]) -> dict[str, Spec]:
        """Shapes and dtypes of `tensors()`."""
        return {"scale": ((shape[0], groups(shape[1], form["group_size"])), torch.float16)}

    @classmethod
    def restore(cls, form: Form, tensors: Mapping[str, Tensor]) -> Self:
        """From saved metadata and tensors."""
        return cls(form["bits"], form["group_size"], tensors["scale"])
