"""Dual-grained integers (DGQ, QoQ): value = channel_scale[n] * (group_scale[n, g] * (code - group_zero[n, g])).

The inner product is an int8 weight, so an int8 kernel can expand groups in integers and scale once per channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from anybit.errors import FormatError
from anybit.formats.decoder import Form, Spec, full_precision_only, groups, per_column


@dataclass(frozen=True)
class DualGrained:
    """Integer scale and zero per group inside a float scale per output channel.

    Attributes:
        bits: code width, 1..8.
        group_size: columns per group.
        channel_scale: float16 [N, 1], positive.
        group_scale: uint8 [N, G], 1..127.
        group_zero: uint8 [N, G] in 0..2^bits-1.
    """

    kind: ClassVar[str] = "dual_grained"
    bits: int
    group_size: int
    channel_scale: Tensor
    group_scale: Tensor
    group_zero: Tensor

    def integer(self, codes: Tensor) -> Tensor:
        """The int8 weight [N, K] = group_scale * (code - group_zero).

        Raises:
            FormatError: a product leaves -128..127, which an int8 kernel could not hold.
        """
        scale = per_column(self.group_scale.int(), codes.shape[1], self.group_size)
        zero = per_column(self.group_zero.int(), codes.shape[1], self.group_size)
        product = scale * (codes.int() - zero)
        if product.numel() and (int(product.min()) < -128 or int(product.max()) > 127):
            raise FormatError(f"dual-grained codes reach {int(product.min())}..{int(product.max())}, outside int8")
        return product.to(torch.int8)

    @property
    def precisions(self) -> tuple[int, ...]:
        """The stored width alone."""
        return (self.bits,)

    def decode(self, codes: Tensor, bits: int | None = None) -> Tensor:
        """Codes uint8 [N, K] to float32 [N, K]."""
        full_precision_only(self.kind, self.bits, bits)
        return self.integer(codes).float() * self.channel_scale.float()

    def encode(self, values: Tensor) -> Tensor:
        """Values float32 [N, K] to the nearest codes uint8 [N, K] whose integer weight fits int8."""
        scale = per_column(self.group_scale.float(), values.shape[1], self.group_size)
        zero = per_column(self.group_zero.float(), values.shape[1], self.group_size)
        low, high = (-(128 // scale)).clamp_min(0 - zero), torch.minimum(127 // scale, 2**self.bits - 1 - zero)
        steps = (values / (scale * self.channel_scale.float())).round()
        return (torch.minimum(torch.maximum(steps, low), high) + zero).to(torch.uint8)

    def tensors(self) -> dict[str, Tensor]:
        """`channel_scale`, `group_scale`, `group_zero`."""
        return {"channel_scale": self.channel_scale, "group_scale": self.group_scale, "group_zero": self.group_zero}

    def form(self) -> Form:
        """JSON metadata."""
        return {"kind": self.kind, "bits": self.bits, "group_size": self.group_size}

    @classmethod
    def specs(cls, form: Form, shape: tuple[int, int]) -> dict[str, Spec]:
        """Shapes and dtypes of `tensors()`."""
        table = (shape[0], groups(shape[1], form["group_size"]))
        return {
            "channel_scale": ((shape[0], 1), torch.float16),
            "group_scale": (table, torch.uint8),
            "group_zero": (table, torch.uint8),
        }

    @classmethod
    def restore(cls, form: Form, tensors: Mapping[str, Tensor]) -> Self:
        """From saved metadata and tensors."""
        names = ("channel_scale", "group_scale", "group_zero")
        return cls(form["bits"], form["group_size"], *(tensors[name] for name in names))
