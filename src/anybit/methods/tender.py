"""Tender's calibration (arXiv 2406.12930, ISCA 2024): which group each channel of a linear's input is in, and its bias.

    bias[k]   mean over samples of (lowest + highest) / 2, for inputs that a norm wrote (as in the paper), else 0
    CMax[k]   largest |x - bias| over all samples, TMax = max CMax
    shift[k]  the least i with CMax[k] <= TMax / 2^(groups - 1 - i); `direction: down` one less: finer, and large values saturate
    scale     TMax / 2^(groups - 1) / (2^(bits - 1) - 1), where it is static

Weights are `rtn-symmetric`, one scale a row, in the paper.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from anybit.errors import CalibrationError
from anybit.formats.tender import MOST_GROUPS, TenderActivations
from anybit.methods.activations import ActivationMethod
from anybit.methods.base import InputStats


class TenderInputs(ActivationMethod):
    """Options: `bits`, `groups`, `static` (else each token has its own scale), `direction` (up, down); `bias` where a norm wrote
    the input (norms), everywhere (all), or nowhere: elsewhere the first token's outliers would set the middle of a range."""

    name: ClassVar[str] = "tender"
    bits: int = Field(default=8, ge=2, le=8)
    groups: int = Field(default=8, ge=1, le=MOST_GROUPS)
    bias: Literal["norms", "all", "none"] = "norms"
    static: bool = False
    direction: Literal["up", "down"] = "up"

    @property
    def needs(self) -> frozenset[str]:
        """Each channel's range."""
        return frozenset({"range"})

    def spec(self) -> TenderActivations:
        """The scheme."""
        return TenderActivations(self.bits, self.groups, self.static, self.bias != "none")

    def tensors(self, stats: InputStats, columns: int) -> dict[str, Tensor]:
        """`input_shift`, and `input_bias` and `input_scale` where there are any.

        Raises:
            CalibrationError: no token reached this layer.
        """
        if stats.sample_range is None:
            raise CalibrationError(f"{stats.name}: channel groups need calibration tokens; use more text")
        low, high = stats.sample_range.unbind(1)
        biased = self.bias == "all" or (self.bias == "norms" and stats.after_norm)
        bias = ((low + high) / 2).mean(0) if biased else torch.zeros(columns)
        largest = torch.maximum(high - bias, bias - low).amax(0)
        found = {"input_shift": self.shifts(largest)}
        if self.bias != "none":
            found["input_bias"] = bias
        if self.static:
            smallest = float(largest.max()) / 2 ** (self.groups - 1) / (2 ** (self.bits - 1) - 1)
            found["input_scale"] = torch.tensor([max(smallest, 1e-12)])
        return found

    def shifts(self, largest: Tensor) -> Tensor:
        """The group of each channel, uint8 [K], from CMax float32 [K]."""
        borders = largest.max() * 2.0 ** torch.arange(1 - self.groups, 0)
        shift = (largest[:, None] > borders).sum(1)
        return (shift if self.direction == "up" else (shift - 1).clamp_min(0)).to(torch.uint8)
