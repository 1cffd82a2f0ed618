"""Nested affine integers: the top p bits of a code are the p-bit code, with a grid of its own for every tabled width.

    value_p[n, k] = scale_t[n, g] * (middle_p(code[n, k]) - zero_t[n, g]),    g = k // group_size
    middle_p(c) = (c >> (b - p)) 2^(b-p) + (2^(b-p) - 1) / 2                 the middle of the codes that share p bits

where t is the narrowest tabled width >= p and scale_t = float16(scale * ratio_t / 128). Every width is uniform, so its first
p planes run on the integer kernels (methods/any_precision.md 2.5).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from anybit.errors import FormatError
from anybit.formats.affine import Affine
from anybit.formats.decoder import Form, Spec, groups, per_column

RATIO_ONE = 128


@dataclass(frozen=True)
class NestedAffine:
    """Several grids over the same bit-planes; G = ceil(K / group_size).

    Attributes:
        bits: stored (parent) width b, 2..8.
        group_size: columns per group; K for one group a row.
        precisions: readable widths, ascending; the last is `bits`.
        scale: float16 [N, G], positive: one step of the stored codes at full width.
        zeros: tabled width -> uint8 [N, G], in steps of the stored codes. `bits` is always tabled.
        ratios: tabled width below `bits` -> uint8 [N, G] in 1..255: its scale, in 128ths of `scale`.
    """

    kind: ClassVar[str] = "nested_affine"
    bits: int
    group_size: int
    precisions: tuple[int, ...]
    scale: Tensor
    zeros: dict[int, Tensor]
    ratios: dict[int, Tensor]

    def grid(self, bits: int) -> tuple[Tensor, Tensor]:
        """(scale float16 [N, G], zero uint8 [N, G]) of a readable width, both in steps of the stored codes.

        Raises:
            FormatError: a width this weight does not offer.
        """
        if bits not in self.precisions:
            raise FormatError(f"no {bits} bits in this weight; it holds {list(self.precisions)}")
        table = min(t for t in self.zeros if t >= bits)
        if table == self.bits:
            return self.scale, self.zeros[table]
        return (self.scale.float() * self.ratios[table].float() / RATIO_ONE).half(), self.zeros[table]

    def full(self) -> Affine:
        """The grid at full width, where it is an ordinary one."""
        return Affine(self.bits, self.group_size, self.scale, self.zeros[self.bits])

    def decode(self, codes: Tensor, bits: int | None = None) -> Tensor:
        """Codes uint8 [N, K] of the stored width to float32 [N, K] at a readable width (default: all)."""
        bits = self.bits if bits is None else bits
        scale, zero = (per_column(table.float(), codes.shape[1], self.group_size) for table in self.grid(bits))
        return (middle(codes, self.bits - bits) - zero) * scale

    def encode(self, values: Tensor) -> Tensor:
        """Values float32 [N, K] to the nearest codes uint8 [N, K] of full width; ties to even, out of range saturates."""
        scale, zero = (per_column(table.float(), values.shape[1], self.group_size) for table in self.grid(self.bits))
        return ((values / scale).round() + zero).clamp(0, 2**self.bits - 1).to(torch.uint8)

    def tensors(self) -> dict[str, Tensor]:
        """`scale`, and `zero{t}`, `ratio{t}` of each tabled width t."""
        zeros = {f"zero{t}": zero for t, zero in sorted(self.zeros.items())}
        return {"scale": self.scale} | zeros | {f"ratio{t}": ratio for t, ratio in sorted(self.ratios.items())}

    def form(self) -> Form:
        """JSON metadata."""
        facts = {"kind": self.kind, "bits": self.bits, "group_size": self.group_size}
        return {**facts, "precisions": list(self.precisions), "tables": sorted(self.zeros)}

    @classmethod
    def specs(cls, form: Form, shape: tuple[int, int]) -> dict[str, Spec]:
        """Shapes and dtypes of `tensors()`."""
        table = (shape[0], groups(shape[1], form["group_size"]))
        specs: dict[str, Spec] = {"scale": (table, torch.float16)}
        specs |= {f"zero{t}": (table, torch.uint8) for t in form["tables"]}
        return specs | {f"ratio{t}": (table, torch.uint8) for t in form["tables"] if t != form["bits"]}

    @classmethod
    def restore(cls, form: Form, tensors: Mapping[str, Tensor]) -> Self:
        """From saved metadata and tensors."""
        zeros = {t: tensors[f"zero{t}"] for t in form["tables"]}
        ratios = {t: tensors[f"ratio{t}"] for t in form["tables"] if t != form["bits"]}
        widths = tuple(form["precisions"])
        return cls(form["bits"], form["group_size"], widths, tensors["scale"], zeros, ratios)


def middle(codes: Tensor, dropped: int) -> Tensor:
    """The middle, float32 [N, K], of the codes that differ from `codes` uint8 [N, K] in the last `dropped` bits alone."""
    return ((codes >> dropped) << dropped).float() + (2**dropped - 1) / 2
