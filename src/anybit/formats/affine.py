"""Affine integers: value[n, k] = scale[n, k // g] * (code[n, k] - zero[n, k // g])."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from anybit.formats.decoder import Form, Spec, by_group, full_precision_only, groups, per_column, to_scale


@dataclass(frozen=True)
class Affine:
    """Scale and integer zero point per group of `group_size` columns; G = ceil(K / group_size), the last group may be
    short.

    Attributes:
        bits: code width, 1..8.
        group_size: columns per group; K for one group a row.
        scale: float16 [N, G], positive.
        zero: uint8 [N, G] in 0..2^bits-1, or None for symmetric codes, whose zero is 2^(bits-1).
    """

    kind: ClassVar[str] = "affine"
    bits: int
    group_size: int
    scale: Tensor
    zero: Tensor | None

    @classmethod
    def fit(cls, values: Tensor, bits: int, group_size: int, symmetric: bool = False) -> Affine:
        """The min-max grid of values float32 [N, K] (GPTQ reference code): the range always contains 0.

        Asymmetric: scale = (hi - lo) / (2^b - 1), zero = round(-lo / scale). Symmetric: scale = 2 max|w| / (2^b - 1).
        """
        low, high = group_range(values, group_size)
        return cls.from_range(low, high, bits, group_size, symmetric)

    @classmethod
    def from_range(
        cls, low: Tensor, high: Tensor, bits: int, group_size: int, symmetric: bool, steps: int | None = None
    ) -> Affine:
        """The grid that covers [low, high], both float32 [N, G] with low <= 0 <= high, in `steps` (default: all of `bits`)."""
        steps = 2**bits - 1 if steps is None else steps
        empty = (low == 0) & (high == 0)
        if symmetric:
            reach = torch.where(empty, torch.ones_like(high), torch.maximum(-low, high))
            return cls(bits, group_size, to_scale(2 * reach / steps), None)
        low, high = torch.where(empty, -torch.ones_like(low), low), torch.where(empty, torch.ones_like(high), high)
        scale = to_scale((high - low) / steps)
        zero = (-low / scale.float()).round().clamp(0, steps)
        return cls(bits, group_size, scale, zero.to(torch.uint8))

    def rows(self, start: int, stop: int) -> Affine:
        """The grid of rows start..stop-1 alone."""
        zero = None if self.zero is None else self.zero[start:stop]
        return Affine(self.bits, self.group_size, self.scale[start:stop], zero)

    def _grid(self, columns: int) -> tuple[Tensor, Tensor | float]:
        scale = per_column(self.scale.float(), columns, self.group_size)
        if self.zero is None:
            return scale, float(2 ** (self.bits - 1))
        return scale, per_column(self.zero.float(), columns, self.group_size)

    @property
    def precisions(self) -> tuple[int, ...]:
        """The stored width alone."""
        return (self.bits,)

    def decode(self, codes: Tensor, bits: int | None = None) -> Tensor:
        """Codes uint8 [N, K] to float32 [N, K]."""
        full_precision_only(self.kind, self.bits, bits)
        scale, zero = self._grid(codes.shape[1])
        return (codes.float() - zero) * scale

    def encode(self, values: Tensor) -> Tensor:
        """Values float32 [N, K] to the nearest codes uint8 [N, K]; ties to even, out of range saturates."""
        scale, zero = self._grid(values.shape[1])
        return ((values / scale).round() + zero).clamp(0, 2**self.bits - 1).to(torch.uint8)

    def tensors(self) -> dict[str, Tensor]:
        """`scale`, and `zero` unless symmetric."""
        return {"scale": self.scale} if self.zero is None else {"scale": self.scale, "zero": self.zero}

    def form(self) -> Form:
        """JSON metadata."""
        return {"kind": self.kind, "bits": self.bits, "group_size": self.group_size, "symmetric": self.zero is None}

    @classmethod
    def specs(cls, form: Form, shape: tuple[int, int]) -> dict[str, Spec]:
        """Shapes and dtypes of `tensors()`."""
        table = (shape[0], groups(shape[1], form["group_size"]))
        specs: dict[str, Spec] = {"scale": (table, torch.float16)}
        return specs if form["symmetric"] else {**specs, "zero": (table, torch.uint8)}

    @classmethod
    def restore(cls, form: Form, tensors: Mapping[str, Tensor]) -> Self:
        """From saved metadata and tensors."""
        return cls(form["bits"], form["group_size"], tensors["scale"], None if form["symmetric"] else tensors["zero"])


def group_range(values: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """(min(0, smallest), max(0, largest)) of every group of values [N, K], each [N, G]."""
    # Zero padding of a short last group cannot change a range that contains 0 anyway.
    grouped = by_group(values, group_size)
    return grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)


def group_reach(values: Tensor, group_size: int) -> Tensor:
    """max |values| of every group of values [N, K]: [N, G]; 1 for a group of zeros, which any scale represents."""
    low, high = group_range(values, group_size)
    reach = torch.maximum(-low, high)
    return torch.where(reach == 0, torch.ones_like(reach), reach)
