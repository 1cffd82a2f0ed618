"""What every decoder offers, and the few helpers they share.

A decoder is data: frozen tensors plus a rule that turns codes [N, K] into numbers. Codes live in bit-planes beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from anybit.errors import FormatError
from anybit.formats.form import Form as Form
from anybit.formats.form import groups as groups

Spec = tuple[tuple[int, ...], torch.dtype]


class Decoder(Protocol):
    """The contract of `formats/{affine,dual_grained,codebook,binary_coded,bipolar,floating}.py`."""

    kind: ClassVar[str]

    @property
    def bits(self) -> int:
        """Width of the stored codes, 1..8."""
        ...

    @property
    def precisions(self) -> tuple[int, ...]:
        """Widths `decode` can read, ascending; the last is `bits`. One for every form that is not nested."""
        ...

    def decode(self, codes: Tensor, bits: int | None = None) -> Tensor:
        """Codes uint8 [N, K] to float32 [N, K]. `bits` < stored width reads a nested precision, where there is one."""
        ...

    def encode(self, values: Tensor) -> Tensor:
        """Values float32 [N, K] to the nearest codes uint8 [N, K]; `decode(encode(decode(c))) == decode(c)`."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to save beside the planes, by parameter name."""
        ...

    def form(self) -> Form:
        """The metadata to save: with the layer's shape it determines every tensor's shape and dtype."""
        ...

    @classmethod
    def specs(cls, form: Form, shape: tuple[int, int]) -> dict[str, Spec]:
        """Shape and dtype of every tensor of `tensors()` for a weight of `shape` [N, K]."""
        ...

    @classmethod
    def restore(cls, form: Form, tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `form()` and `tensors()`."""
        ...


def by_group(values: Tensor, group_size: int) -> Tensor:
    """values [N, K] cut into its groups: [N, G, group_size], a short last group filled up with zeros."""
    count = groups(values.shape[1], group_size)
    padded = torch.nn.functional.pad(values, (0, count * group_size - values.shape[1]))
    return padded.view(values.shape[0], count, group_size)


def per_column(table: Tensor, columns: int, group_size: int) -> Tensor:
    """Spread a per-group table [N, G] over the columns: [N, columns]; to read, it may be a view."""
    if table.shape[1] != groups(columns, group_size):
        raise FormatError(
            f"{columns} columns in groups of {group_size} need {groups(columns, group_size)} entries, got "
            f"{table.shape[1]}"
        )
    if table.shape[1] == 1:
        return table.expand(-1, columns)
    return table.repeat_interleave(group_size, dim=1)[:, :columns]


def full_precision_only(kind: str, stored: int, asked: int | None) -> None:
    """Raise FormatError when a nested precision is asked of a form that holds only one."""
    if asked is not None and asked != stored:
        raise FormatError(
            f"this {kind} weight holds {stored} bits only, {asked} was asked for; quantize it with a nested recipe"
        )


def check_scale(scale: Tensor, what: str) -> None:
    """Raise FormatError on NaN, infinite or zero scales: they would decode to silent damage."""
    if not bool(torch.isfinite(scale).all()):
        raise FormatError(f"{what} has NaN or infinite entries")
    if bool((scale == 0).any()):
        raise FormatError(f"{what} has zero entries")


def to_scale(scale: Tensor) -> Tensor:
    """Round positive float32 scales to float16, never to zero.

    Raises:
        FormatError: a scale is NaN or above 65504.
    """
    half = scale.clamp_min(2.0**-24).to(torch.float16)
    check_scale(half, "scale")
    return half
