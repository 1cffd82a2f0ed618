"""What quantizing activations gives, and what all schemes share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.formats.decoder import per_column

SMALLEST = 2.0**-100
"""A group whose range is smaller has scale 0 and codes 0; what is divided by anything larger stays finite."""


@dataclass(frozen=True)
class Codes:
    """Quantized activations.

    Attributes:
        codes: int8 [T, K] of an integer scheme, float32 [T, K] (numbers of the small float type) of a float one.
        scale: float32 [T, G], G = ceil(K / group_size).
        offset: float32 [T, G], or None where it is 0.
        group_size: columns per scale; K: one scale a token.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    group_size: int

    def values(self) -> Tensor:
        """The numbers the codes stand for, float32 [T, K]; 0 (plus offset) in columns that bypass."""
        columns = self.codes.shape[1]
        found = self.codes.float() * per_column(self.scale, columns, self.group_size)
        return found if self.offset is None else found + per_column(self.offset, columns, self.group_size)


def steps(span: Tensor, levels: float) -> tuple[Tensor, Tensor]:
    """Scale and its inverse for `span` [T, G] in `levels` steps; 0 and 0 below `SMALLEST`, NaN and 0 if not finite."""
    usable = (span >= SMALLEST) & span.isfinite()
    factor = torch.where(usable, levels / span, 0.0)
    return torch.where(usable, span / levels, torch.where(span.isfinite(), 0.0, torch.nan)), factor


def without(x: Tensor, bypass: Tensor | None, value: float) -> Tensor:
    """x [T, K] with `value` in the columns that bypass."""
    return x if bypass is None else x.index_fill(1, bypass.long(), value)
