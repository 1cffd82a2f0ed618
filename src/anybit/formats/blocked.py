"""Affine integers whose scales and offsets are in turn small integers, with a float each per block of columns (GGUF's K types).

    value[n, k] = S[n, g] * (code[n, k] - zero) - O[n, g]      zero = 2^(bits-1) without an offset, 0 with one
    S[n, g] = scale[n, B] * step[n, g],  O[n, g] = offset[n, B] * offset_step[n, g],  g = k // group_size, B = k // block_size

With block_size == group_size there are no steps: scale and offset are those of the group (GGUF's Q4_1). All arithmetic is
float32, one operation after the other, as the reference dequantizer of GGUF does it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from anybit.formats.decoder import Form, Spec, full_precision_only, groups, per_column


@dataclass(frozen=True)
class Blocked:
    """G = ceil(K / group_size), B = ceil(K / block_size).

    Attributes:
        bits: code width, 1..8.
        group_size: columns per step.
        block_size: columns per float, a multiple of `group_size`.
        scale: float16 [N, B], not zero.
        step: int8 [N, G], or None where block_size == group_size.
        offset: float16 [N, B], or None: codes around 2^(bits-1).
        offset_step: int8 [N, G]; there when both `step` and `offset` are.
    """

    kind: ClassVar[str] = "blocked"
    bits: int
    group_size: int
    block_size: int
    scale: Tensor
    step: Tensor | None
    offset: Tensor | None
    offset_step: Tensor | None

    @property
    def precisions(self) -> tuple[int, ...]:
        """The stored width alone."""
        return (self.bits,)

    @property
    def zero(self) -> float:
        """The code of value 0, before the offset."""
        return 2.0 ** (self.bits - 1) if self.offset is None else 0.0

    def scales(self) -> Tensor:
        """S float32 [N, G]."""
        return self._per_group(self.scale, self.step)

    def offsets(self) -> Tensor | None:
        """O float32 [N, G]."""
        return None if self.offset is None else self._per_group(self.offset, self.offset_step)

    def _per_group(self, table: Tensor, steps: Tensor | None) -> Tensor:
        if steps is None:
            return table.float()
        return per_column(table.float(), steps.shape[1], self.block_size // self.group_size) * steps.float()

    def decode(self, codes: Tensor, bits: int | None = None) -> Tensor:
        """Codes uint8 [N, K] to float32 [N, K]."""
        full_precision_only(self.kind, self.bits, bits)
        offsets, columns = self.offsets(), codes.shape[1]
        values = per_column(self.scales(), columns, self.group_size) * (codes.float() - self.zero)
        return values if offsets is None else values - per_column(offsets, columns, self.group_size)

    def encode(self, values: Tensor) -> Tensor:
        """Values float32 [N, K] to the nearest codes uint8 [N, K]; a group whose step is 0 gets the code of 0."""
        offsets, scale = self.offsets(), per_column(self.scales(), values.shape[1], self.group_size)
        shifted = values if offsets is None else values + per_column(offsets, values.shape[1], self.group_size)
        codes = torch.where(scale == 0, 0.0, shifted / scale).round() + self.zero
        return codes.clamp(0, 2**self.bits - 1).to(torch.uint8)

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there."""
        named = {"scale": self.scale, "step": self.step, "offset": self.offset, "offset_step": self.offset_step}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def form(self) -> Form:
        """JSON metadata."""
        sizes = {"group_size": self.group_size, "block_size": self.block_size}
        return {"kind": self.kind, "bits": self.bits, **sizes, "offset": self.offset is not None}

    @classmethod
    def specs(cls, form: Form, shape: tuple[int, int]) -> dict[str, Spec]:
        """Shapes and dtypes of `tensors()`."""
        block: Spec = ((shape[0], groups(shape[1], form["block_size"])), torch.float16)
        group: Spec = ((shape[0], groups(shape[1], form["group_size"])), torch.int8)
        named = {"scale": block, "step": group, "offset": block, "offset_step": group}
        absent = set() if form["block_size"] > form["group_size"] else {"step", "offset_step"}
        absent |= set() if form["offset"] else {"offset", "offset_step"}
        return {name: spec for name, spec in named.items() if name not in absent}

    @classmethod
    def restore(cls, form: Form, tensors: Mapping[str, Tensor]) -> Self:
        """From saved metadata and tensors."""
        sizes = (form["bits"], form["group_size"], form["block_size"])
        return cls(*sizes, tensors["scale"], *(tensors.get(name) for name in ("step", "offset", "offset_step")))
