"""Activations on the odd grid of `formats/bipolar.py`: integers on both sides, no zero point on either.

Source: bipolar-INT (arXiv 2409.17870); the rounding is our reconstruction, the mid-rise quantizer that the format implies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from anybit.errors import FormatError
from anybit.formats.codes import Codes, steps, without
from anybit.formats.decoder import Spec, by_group, per_column


@dataclass(frozen=True)
class BipolarActivations:
    """Odd integers in -(2^bits - 1)..2^bits - 1, one scale per token or per group of a token, dynamic.

    scale = clip * max|x| / (2^bits - 1) (1 bit: mean|x|), code = 2 floor(x / (2 scale)) + 1, saturating. Zero is not on the
    grid: what is small becomes +-scale, save in a group of zeros, whose scale is 0. At 8 bits the codes leave int8: use int.
    """

    kind: ClassVar[str] = "bipolar"
    bits: int = 4
    granularity: Literal["token", "group"] = "token"
    group_size: int = 128
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 7:
            raise FormatError(f"bipolar activations have 1 to 7 bits, got {self.bits}")

    def columns_per_group(self, columns: int) -> int:
        """`group_size` for granularity "group", else the row."""
        return min(self.group_size, columns) if self.granularity == "group" else columns

    def encode(self, x: Tensor, tensors: Mapping[str, Tensor], bypass: Tensor | None = None) -> Codes:
        """See `ActivationSpec`."""
        size, top = self.columns_per_group(x.shape[1]), 2**self.bits - 1
        by_size = by_group(without(x, bypass, 0.0), size).abs()
        if self.bits == 1:
            counts = by_group(without(torch.ones_like(x[:1]), bypass, 0.0), size).sum(-1)
            reach = by_size.sum(-1) / counts.clamp_min(1)
        else:
            reach = by_size.amax(-1)
        scale, factor = steps(reach * self.clip, top)
        halved = (x * per_column(factor, x.shape[1], size) / 2).floor().nan_to_num(0.0)
        codes = (2 * halved + 1).clamp(-top, top).to(torch.int8)
        if bypass is not None:
            codes[:, bypass.long()] = 0
        return Codes(codes, scale, None, size)

    def specs(self, columns: int) -> dict[str, Spec]:
        """None: scales are dynamic."""
        return {}

    def form(self) -> dict[str, Any]:
        """JSON metadata."""
        return {"kind": self.kind, **self.__dict__}

    @classmethod
    def restore(cls, form: Mapping[str, Any]) -> Self:
        """From saved metadata."""
        return cls(**{key: value for key, value in form.items() if key != "kind"})
