"""Quantized activations: what a layer makes of its input before multiplying; `form["activations"]` of config.json.

Every scheme turns x [T, K] into `Codes`: x is about scale[t, g] * code[t, k] + offset[t, g]. Integer codes go straight
into integer kernels; columns that *bypass* (those of a layer's `columns` term) have code 0 and enter no range.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor

from anybit.errors import FormatError
from anybit.formats.bipolar_activations import BipolarActivations
from anybit.formats.codes import Codes as Codes
from anybit.formats.codes import steps, without
from anybit.formats.decoder import Spec, by_group, groups, per_column
from anybit.formats.floating import FloatType
from anybit.formats.tender import TenderActivations


class ActivationSpec(Protocol):
    """The contract of an activation scheme; frozen data."""

    kind: ClassVar[str]

    def columns_per_group(self, columns: int) -> int:
        """Columns that share a scale, of rows of `columns`."""
        ...

    def encode(self, x: Tensor, tensors: Mapping[str, Tensor], bypass: Tensor | None = None) -> Codes:
        """x float32 [T, K] in codes; `tensors` are those of `specs`, `bypass` int [n] the columns left out.

        A token's codes depend on its row alone.
        """
        ...

    def specs(self, columns: int) -> dict[str, Spec]:
        """Shape and dtype of every tensor saved with it, by name; none for a dynamic scheme."""
        ...

    def form(self) -> dict[str, Any]:
        """The JSON of `form["activations"]`."""
        ...


@dataclass(frozen=True)
class IntActivations:
    """Integers of `bits` bits, one scale per token, per group of a token, or one for all (`static`).

    symmetric   code in -q..q, q = 2^(bits-1) - 1; scale = clip * max|x| / q, offset 0.
    otherwise   with lo, hi the range over the columns that do not bypass (shrunken by `clip`): scale = (hi - lo) / (2^bits - 1),
                code = round((x - lo) / scale) - 2^(bits-1), offset = lo + 2^(bits-1) * scale. Zero need not be in the range.
                With `rounded_zero` it is, and the offset is an integer multiple of the scale.

    Rounding is to nearest, ties to even, and saturates. Static schemes read `input_scale` float32 [G] (and `input_offset`
    float32 [G] unless symmetric) and have granularity "tensor" or "group" in the sense of columns.

    Sources: QUIK's kernel form (EMNLP 2024, per token, asymmetric), QServe and SmoothQuant (per token, symmetric), FlexQ (per
    group of 128, symmetric), ABQ-LLM (per token, rounded zero), DGQ (static).
    """

    kind: ClassVar[str] = "int"
    bits: int = 8
    symmetric: bool = True
    granularity: Literal["token", "group", "tensor"] = "token"
    group_size: int = 128
    static: bool = False
    clip: float = 1.0
    rounded_zero: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise FormatError(f"activations have 2 to 8 bits, got {self.bits}")
        _check_static(self.granularity, self.static)

    def columns_per_group(self, columns: int) -> int:
        """`group_size` for granularity "group", else the row."""
        return min(self.group_size, columns) if self.granularity == "group" else columns

    def encode(self, x: Tensor, tensors: Mapping[str, Tensor], bypass: Tensor | None = None) -> Codes:
        """See `ActivationSpec`. A group that holds NaN or infinity gets scale NaN: what it multiplies is NaN, not plausible."""
        size, top = self.columns_per_group(x.shape[1]), 2 ** (self.bits - 1)
        if self.static:
            scale = tensors["input_scale"].expand(len(x), -1)
            offset = None if self.symmetric else tensors["input_offset"].expand(len(x), -1)
            factor = 1 / scale
        elif self.symmetric:
            reach = by_group(without(x, bypass, 0.0), size).abs().amax(-1) * self.clip
            scale, factor, offset = *steps(reach, top - 1), None
        else:
            low, high = self._range(x, bypass, size)
            scale, factor = steps(high - low, 2 * top - 1)
            offset = low + top * scale
            if self.rounded_zero:
                offset = torch.where(scale > 0, (offset * factor).round() * scale, offset)
        shifted = x if offset is None else x - per_column(offset, x.shape[1], size)
        codes = (shifted * per_column(factor, x.shape[1], size)).round().nan_to_num(0.0)
        codes = codes.clamp(1 - top if self.symmetric else -top, top - 1).to(torch.int8)
        if bypass is not None:
            codes[:, bypass.long()] = 0
        return Codes(codes, scale, offset, size)

    def _range(self, x: Tensor, bypass: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
        """Lowest and highest value of each group [T, G]; columns beyond K and those that bypass do not count."""
        whole = groups(x.shape[1], size) * size - x.shape[1]
        low, high = (
            by_group(torch.nn.functional.pad(without(x, bypass, end), (0, whole), value=end), size)
            for end in (torch.inf, -torch.inf)
        )
        low, high = low.amin(-1), high.amax(-1)
        empty = low > high  # every column of the group bypasses
        low, high = (torch.where(empty, 0.0, end) * self.clip for end in (low, high))
        return (low.clamp_max(0), high.clamp_min(0)) if self.rounded_zero else (low, high)

    def specs(self, columns: int) -> dict[str, Spec]:
        """`input_scale` and `input_offset` of a static scheme."""
        names = ("input_scale",) if self.symmetric else ("input_scale", "input_offset")
        table = ((groups(columns, self.columns_per_group(columns)),), torch.float32)
        return dict.fromkeys(names, table) if self.static else {}

    def form(self) -> dict[str, Any]:
        """JSON metadata."""
        return {"kind": self.kind, **self.__dict__}

    @classmethod
    def restore(cls, form: Mapping[str, Any]) -> Self:
        """From saved metadata."""
        return cls(**{key: value for key, value in form.items() if key != "kind"})


@dataclass(frozen=True)
class FloatActivations:
    """Small floats (FP8 E4M3 and the like): scale = max|x| / largest, per token, per group or static; the code is the number
    itself.

    Source: the FP8 recipes of "FP8 versus INT8 for efficient deep learning inference" and common practice.
    """

    kind: ClassVar[str] = "float"
    type: str = "e4m3"
    granularity: Literal["token", "group", "tensor"] = "token"
    group_size: int = 128
    static: bool = False

    def __post_init__(self) -> None:
        FloatType.parse(self.type)
        _check_static(self.granularity, self.static)

    def columns_per_group(self, columns: int) -> int:
        """`group_size` for granularity "group", else the row."""
        return min(self.group_size, columns) if self.granularity == "group" else columns

    def encode(self, x: Tensor, tensors: Mapping[str, Tensor], bypass: Tensor | None = None) -> Codes:
        """See `ActivationSpec`; saturates, never NaN from finite input."""
        size, numbers = self.columns_per_group(x.shape[1]), FloatType.parse(self.type)
        x = without(x, bypass, 0.0)
        if self.static:
            scale = tensors["input_scale"].expand(len(x), -1)
            factor = 1 / scale
        else:
            scale, factor = steps(by_group(x, size).abs().amax(-1), numbers.largest)
        scaled = x * per_column(factor, x.shape[1], size)
        return Codes(numbers.value(numbers.round(scaled)), scale, None, size)

    def specs(self, columns: int) -> dict[str, Spec]:
        """`input_scale` of a static scheme."""
        table = ((groups(columns, self.columns_per_group(columns)),), torch.float32)
        return {"input_scale": table} if self.static else {}

    def form(self) -> dict[str, Any]:
        """JSON metadata."""
        return {"kind": self.kind, **self.__dict__}

    @classmethod
    def restore(cls, form: Mapping[str, Any]) -> Self:
        """From saved metadata."""
        return cls(**{key: value for key, value in form.items() if key != "kind"})


Scheme = IntActivations | FloatActivations | BipolarActivations | TenderActivations
SCHEMES: dict[str, type[Scheme]] = {
    "int": IntActivations,
    "float": FloatActivations,
    "bipolar": BipolarActivations,
    "tender": TenderActivations,
}


def restore_activations(form: Mapping[str, Any]) -> ActivationSpec | None:
    """The scheme of a layer's form; None when its activations stay float.

    Raises:
        FormatError: a scheme or a field that this version does not know.
    """
    found = form.get("activations")
    if found is None:
        return None
    if found.get("kind") not in SCHEMES:
        raise FormatError(f"activations '{found.get('kind')}' are not known to this version of anybit; update anybit")
    try:
        return SCHEMES[found["kind"]].restore(found)
    except TypeError as error:
        raise FormatError(f"activations of kind '{found['kind']}': {error}; update anybit") from None


def _check_static(granularity: str, static: bool) -> None:
    if static and granularity == "token":
        raise FormatError(
            "activations per token have dynamic scales; static ones are per tensor or per group of columns"
        )
    if not static and granularity == "tensor":
        raise FormatError("one scale for all tokens is static: a token's result may not depend on the others")
