"""Binary-coded weights (BCQ, AnyBCQ, ShiftAddLLM, DB-LLM): value = offset + sum_i alpha_i * (2 bit_i - 1), per
group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from anybit.errors import FormatError
from anybit.formats.decoder import Form, Spec, groups, per_column


@dataclass(frozen=True)
class BinaryCoded:
    """A sum of +-1 planes with a free scale per plane and group; nested when several precisions carry their own scales.

    Attributes:
        bits: planes stored, 1..8; must be a key of `alphas`.
        group_size: columns per group.
        alphas: precision p -> float16 [N, G, p]; entry i scales plane i (plane 0 = most significant code bit).
        offsets: precision p -> float16 [N, G], or None when every offset is 0.
    """

    kind: ClassVar[str] = "binary_coded"
    bits: int
    group_size: int
    alphas: dict[int, Tensor]
    offsets: dict[int, Tensor] | None = None

    @property
    def precisions(self) -> tuple[int, ...]:
        """Those with scales of their own."""
        return tuple(sorted(self.alphas))

    def levels(self, bits: int) -> Tensor:
        """Every value a code can take, float32 [N, G, 2^bits], by code."""
        codes = torch.arange(2**bits)
        signs = torch.stack([((codes >> (bits - 1 - i)) & 1) * 2 - 1 for i in range(bits)]).float()
        levels = self.alphas[bits].float() @ signs
        return levels if self.offsets is None else levels + self.offsets[bits].float()[..., None]

    def decode(self, codes: Tensor, bits: int | None = None) -> Tensor:
        """Codes uint8 [N, K] of the stored width to float32 [N, K], using the first `bits` planes (default: all).

        Raises:
            FormatError: no scales for that precision.
        """
        bits = self.bits if bits is None else bits
        if bits not in self.alphas:
            raise FormatError(f"no scales for {bits} bits; this weight holds {sorted(self.alphas)}")
        columns = codes.shape[1]
        values = torch.zeros(codes.shape)
        for i in range(bits):
            sign = ((codes >> (self.bits - 1 - i)) & 1).float() * 2 - 1
            values += sign * per_column(self.alphas[bits][:, :, i].float(), columns, self.group_size)
        return (
            values
            if self.offsets is None
            else values + per_column(self.offsets[bits].float(), columns, self.group_size)
        )

    def encode(self, values: Tensor) -> Tensor:
        """Values float32 [N, K] to the codes uint8 [N, K] of the nearest level; the lowest such level wins a tie."""
        levels, order = self.levels(self.bits).sort(dim=2, stable=True)
        codes = torch.empty(values.shape, dtype=torch.uint8)
        for g in range(levels.shape[1]):
            run = slice(g * self.group_size, (g + 1) * self.group_size)
            borders = (levels[:, g, 1:] + levels[:, g, :-1]) / 2
            codes[:, run] = order[:, g].gather(1, torch.searchsorted(borders.contiguous(), values[:, run].contiguous()))
        return codes

    def tensors(self) -> dict[str, Tensor]:
        """`alpha{p}` and, unless all offsets are 0, `offset{p}` for each precision."""
        tensors = {f"alpha{p}": alpha for p, alpha in sorted(self.alphas.items())}
        return tensors | {f"offset{p}": offset for p, offset in sorted((self.offsets or {}).items())}

    def form(self) -> Form:
        """JSON metadata."""
        precisions = sorted(self.alphas)
        return {
            "kind": self.kind,
            "bits": self.bits,
            "group_size": self.group_size,
            "precisions": precisions,
            "offset": self.offsets is not None,
        }

    @classmethod
    def specs(cls, form: Form, shape: tuple[int, int]) -> dict[str, Spec]:
        """Shapes and dtypes of `tensors()`."""
        table = (shape[0], groups(shape[1], form["group_size"]))
        specs: dict[str, Spec] = {f"alpha{p}": ((*table, p), torch.float16) for p in form["precisions"]}
        return specs | {f"offset{p}": (table, torch.float16) for p in form["precisions"] if form["offset"]}

    @classmethod
    def restore(cls, form: Form, tensors: Mapping[str, Tensor]) -> Self:
        """From saved metadata and tensors."""
        offsets = {p: tensors[f"offset{p}"] for p in form["precisions"]} if form["offset"] else None
        return cls(form["bits"], form["group_size"], {p: tensors[f"alpha{p}"] for p in form["precisions"]}, offsets)
