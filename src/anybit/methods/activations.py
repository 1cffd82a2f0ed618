"""Quantizers of activations: which scheme a layer's input gets, and its static scales where it has any.

The arithmetic is `formats/activation.py`; here are the options of recipes and what calibration gives to static scales.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from anybit.errors import CalibrationError, FormatError
from anybit.formats.activation import ActivationSpec, FloatActivations, IntActivations
from anybit.formats.decoder import by_group
from anybit.formats.floating import FloatType
from anybit.methods.base import InputStats


class ActivationMethod(BaseModel):
    """A quantizer of a linear's input: its fields are the recipe's options, checked by pydantic."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: ClassVar[str]

    @property
    def needs(self) -> frozenset[str]:
        """Which parts of `InputStats` `tensors` reads."""
        return frozenset()

    def spec(self) -> ActivationSpec:
        """The scheme, known before any work."""
        raise NotImplementedError

    def tensors(self, stats: InputStats, columns: int) -> dict[str, Tensor]:
        """What `spec().specs(columns)` names; nothing for a dynamic scheme."""
        return {}


class _Ranged(ActivationMethod):
    granularity: Literal["token", "group", "tensor"] = "token"
    group_size: int = Field(default=128, ge=32)
    static: bool = False
    percentile: float = Field(default=1.0, gt=0, le=1)

    @property
    def needs(self) -> frozenset[str]:
        """Static scales are read off the largest magnitudes."""
        return frozenset({"max_abs"}) if self.static else frozenset()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        try:
            self.spec()
        except FormatError as error:
            raise ValueError(str(error)) from None
        return self

    def reach(self, stats: InputStats, columns: int) -> Tensor:
        """float32 [G], the largest magnitude of each group: the quantile `percentile` over calibration samples of each sample's
        own largest, so that one spike does not set the range.

        Raises:
            CalibrationError: no token reached this layer.
        """
        if stats.sample_max is None or not stats.tokens:
            raise CalibrationError(f"{stats.name}: a static activation scale needs calibration tokens; use more text")
        size = self.spec().columns_per_group(columns)
        largest = by_group(stats.sample_max, size).amax(-1)
        return torch.quantile(largest, self.percentile, dim=0).clamp_min(1e-12)


class IntInputs(_Ranged):
    """Integers; options as `formats/activation.py: IntActivations`, and `percentile` for static scales (symmetric only)."""

    name: ClassVar[str] = "int"
    bits: int = Field(default=8, ge=2, le=8)
    symmetric: bool = True
    clip: float = Field(default=1.0, gt=0, le=1)
    rounded_zero: bool = False

    @model_validator(mode="after")
    def _static_is_symmetric(self) -> Self:
        if self.static and not self.symmetric:
            raise ValueError("static scales are symmetric in this version; use symmetric=true")
        return self

    def spec(self) -> IntActivations:
        """The scheme."""
        facts: dict[str, Any] = {
            name: getattr(self, name) for name in IntActivations.__dataclass_fields__ if name != "kind"
        }
        return IntActivations(**facts)

    def tensors(self, stats: InputStats, columns: int) -> dict[str, Tensor]:
        """`input_scale` of a static scheme."""
        if not self.static:
            return {}
        return {"input_scale": self.reach(stats, columns) * self.clip / (2 ** (self.bits - 1) - 1)}


class FloatInputs(_Ranged):
    """Small floats; options as `formats/activation.py: FloatActivations`."""

    name: ClassVar[str] = "fp"  # the word "float" keeps inputs as they are
    type: str = "e4m3"

    @field_validator("type")
    @classmethod
    def _known(cls, value: str) -> str:
        FloatType.parse(value)
        return value

    def spec(self) -> FloatActivations:
        """The scheme."""
        return FloatActivations(self.type, self.granularity, self.group_size, self.static)

    def tensors(self, stats: InputStats, columns: int) -> dict[str, Tensor]:
        """`input_scale` of a static scheme."""
        if not self.static:
            return {}
        return {"input_scale": self.reach(stats, columns) / FloatType.parse(self.type).largest}
