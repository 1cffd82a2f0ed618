"""Codebooks (any-precision): value[n, k] = table_p[n, code[n, k] >> (b - p)], one table per row and readable
precision p."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from anybit.errors import FormatError
from anybit.formats.decoder import Form, Spec


@dataclass(frozen=True)
class Codebook:
    """Non-uniform levels per output row, nested: the top p bits of a code index the table of precision p.

    Attributes:
        bits: stored (parent) width, 1..8; must be a key of `tables`.
        tables: precision p -> float16 [N, 2^p].
    """

    kind: ClassVar[str] = "codebook"
    bits: int
    tables: dict[int, Tensor]

    @property
    def precisions(self) -> tuple[int, ...]:
        """Those with a table of their own."""
        return tuple(sorted(self.tables))

    def decode(self, codes: Tensor, bits: int | None = None) -> Tensor:
        """Codes uint8 [N, K] of the parent width to float32 [N, K] at precision `bits` (default: all).

        Raises:
            FormatError: no table for that precision.
        """
        bits = self.bits if bits is None else bits
        if bits not in self.tables:
            raise FormatError(f"no codebook for {bits} bits; this weight holds {sorted(self.tables)}")
        return self.tables[bits].float().gather(1, (codes >> (self.bits - bits)).long())

    def encode(self, values: Tensor) -> Tensor:
        """Values float32 [N, K] to the nearest parent codes uint8 [N, K]; the lower code wins a tie."""
        levels, order = self.tables[self.bits].float().sort(dim=1, stable=True)
        borders = (levels[:, 1:] + levels[:, :-1]) / 2
        return order.gather(1, torch.searchsorted(borders.contiguous(), values.contiguous())).to(torch.uint8)

    def tensors(self) -> dict[str, Tensor]:
        """`table{p}` for each precision."""
        return {f"table{p}": table for p, table in sorted(self.tables.items())}

    def form(self) -> Form:
        """JSON metadata."""
        return {"kind": self.kind, "bits": self.bits, "precisions": sorted(self.tables)}

    @classmethod
    def specs(cls, form: Form, shape: tuple[int, int]) -> dict[str, Spec]:
        """Shapes and dtypes of `tensors()`."""
        return {f"table{p}": ((shape[0], 2**p), torch.float16) for p in form["precisions"]}

    @classmethod
    def restore(cls, form: Form, tensors: Mapping[str, Tensor]) -> Self:
        """From saved metadata and tensors."""
        return cls(form["bits"], {p: tensors[f"table{p}"] for p in form["precisions"]})
