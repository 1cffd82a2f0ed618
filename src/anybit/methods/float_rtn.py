"""8-bit weights by rounding to nearest, in any small float type or INT8: the formats of the FP8-versus-INT8 study on equal terms.

scale = c / largest number of the type, code = nearest number to w / scale; c = max|w| of the row, group or tensor, or of 111
values from 0.1 to 1.2 of it the one with the least squared error (`search: mse`, the study's estimator). `type: auto` decides
per tensor: every row (of an even sample) votes for the type with its least error after that search, the plurality wins.

Sources: "FP8 versus INT8 for efficient deep learning inference" (arXiv 2303.17951), "FP8 Quantization: The Power of the
Exponent" (arXiv 2208.09225).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator
from torch import Tensor

from anybit.errors import FormatError
from anybit.formats.affine import Affine, group_reach
from anybit.formats.decoder import Form, by_group, per_column, to_scale
from anybit.formats.floating import Floating, FloatType
from anybit.formats.terms import CodeTerm, Term
from anybit.methods.base import InputStats, Method

INT8, AUTO = "int8", "auto"
TYPES = ("e2m5", "e3m4", "e4m3", "e5m2", INT8)
CANDIDATES = torch.linspace(0.1, 1.2, 111)
VOTERS = 64
HIGHEST = 448.0
"""max|w| maps to this number at most: a float16 scale below 2^-14 loses bits, and a float grid shifted by powers of two is the
same grid (E5M2 would go up to 57344)."""
BLOCK_WEIGHTS = 1 << 16


class FloatRTN(Method):
    """Options: `type` (e4m3 and the like, int8, auto), `granularity` (row, group of `group_size`, tensor), `search` (mse, none)
    of the range."""

    name: ClassVar[str] = "float-rtn"
    rowwise: ClassVar[bool] = False  # one scale for a tensor, and votes, need all its rows
    type: str = "e4m3"
    granularity: Literal["row", "group", "tensor"] = "row"
    group_size: int = Field(default=128, ge=1)
    search: Literal["none", "mse"] = "none"

    @field_validator("type")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            return value if value in (INT8, AUTO) else FloatType.parse(value).name
        except FormatError as error:
            raise ValueError(f"{error}; or {INT8} or {AUTO}") from None

    @property
    def undecided(self) -> bool:
        """Whether the weight decides the type."""
        return self.type == AUTO

    def decided(self, weight: Tensor) -> tuple[Self, str]:
        """This method with the type that most rows of `weight` float32 [N, K] are best off with, and the votes in words."""
        rows = weight[torch.linspace(0, len(weight) - 1, min(VOTERS, len(weight))).long()].float()
        losses = torch.stack([_search(rows, rows.shape[1], rounding(type))[1].sum(1) for type in TYPES])
        votes = losses.argmin(0).bincount(minlength=len(TYPES)).tolist()
        words = ", ".join(f"{type} {count}" for type, count in zip(TYPES, votes, strict=True) if count)
        return self.model_copy(update={"type": TYPES[votes.index(max(votes))]}), f"type by vote of rows: {words}"

    def plan(self, shape: tuple[int, int]) -> Form:
        """One code term over all columns, of small floats or (INT8) symmetric affine."""
        size = self.columns_per_group(shape[1])
        part: Form = {"kind": "affine", "bits": 8, "group_size": size, "symmetric": True}
        if self.type != INT8:
            numbers = FloatType.parse("e4m3" if self.undecided else self.type)
            part = {"kind": "float", "type": numbers.name, "bits": numbers.bits, "group_size": size}
        return {"shape": list(shape), "terms": [{"term": "code", "columns": [0, shape[1]], **part}]}

    def columns_per_group(self, columns: int) -> int:
        """Columns of a row that share a scale."""
        return min(self.group_size, columns) if self.granularity == "group" else columns

    def quantize(self, weight: Tensor, stats: InputStats) -> list[Term]:
        """One code term."""
        if self.undecided:
            return self.decided(weight)[0].quantize(weight, stats)
        size = self.columns_per_group(weight.shape[1])
        reach = group_reach(weight, size)
        if self.granularity == "tensor":
            reach = reach.amax().expand_as(reach).contiguous()
        if self.search == "mse":
            reach = self._searched(weight, size, reach)
        if self.type == INT8:
            grid: Affine | Floating = Affine(8, size, to_scale(reach / 127), None)
        else:
            numbers = FloatType.parse(self.type)
            grid = Floating(numbers, size, to_scale(reach / highest(numbers)))
        return [CodeTerm.from_codes(grid.encode(weight), grid)]

    def _searched(self, weight: Tensor, size: int, reach: Tensor) -> Tensor:
        """The best c of each group [N, G], or of the whole tensor."""
        function = rounding(self.type)
        step = max(1, BLOCK_WEIGHTS // weight.shape[1])
        pairs = zip(weight.split(step), reach.split(step), strict=True)
        if self.granularity != "tensor":
            return torch.cat([_search(rows, size, function, bound)[0] for rows, bound in pairs])
        losses = sum(_losses(rows, size, function, bound).sum((1, 2)) for rows, bound in pairs)
        assert isinstance(losses, Tensor)
        return reach * CANDIDATES[losses.argmin()]


def highest(numbers: FloatType) -> float:
    """The number that the largest weight maps to; numbers above it stay unused."""
    return min(numbers.largest, HIGHEST)


def rounding(type: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The map (values [N, K], c [N, K]) -> nearest values on the grid of `type`, scaled so that c is its highest number."""
    return _on_integers if type == INT8 else partial(_on_floats, FloatType.parse(type))


def nearest(numbers: FloatType, values: Tensor) -> Tensor:
    """What `numbers.value(numbers.round(values))` is, by arithmetic: ties to even, saturating; float32 or float64."""
    lowest = 2 - 2 ** (numbers.exponent - 1)  # exponent of the smallest normal number
    exponent = (torch.frexp(values).exponent - 1).clamp_min(lowest) - numbers.mantissa
    step = torch.ldexp(torch.ones_like(values), exponent)
    return ((values / step).round() * step).clamp(-numbers.largest, numbers.largest)


def _on_integers(values: Tensor, reach: Tensor) -> Tensor:
    scale = reach / 127
    return (values / scale).round().clamp(-127, 127) * scale


def _on_floats(numbers: FloatType, values: Tensor, reach: Tensor) -> Tensor:
    scale = reach / highest(numbers)
    return nearest(numbers, values / scale) * scale


def _losses(weight: Tensor, size: int, function: Callable[[Tensor, Tensor], Tensor], reach: Tensor) -> Tensor:
    """Squared errors [111, N, G] of every candidate c = candidate * reach, reach [N, G]."""
    return torch.stack(
        [
            by_group((function(weight, per_column(reach * c, weight.shape[1], size)) - weight).square(), size).sum(-1)
            for c in CANDIDATES
        ]
    )


def _search(
    weight: Tensor, size: int, function: Callable[[Tensor, Tensor], Tensor], reach: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The best c and its squared error, both [N, G], of weight [N, K]."""
    reach = group_reach(weight, size) if reach is None else reach
    least, best = _losses(weight, size, function, reach).min(0)
    return reach * CANDIDATES[best], least
