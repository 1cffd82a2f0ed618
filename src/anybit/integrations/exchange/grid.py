"""Uniform grids: the common ground of all integer formats. value[n, k] = scale[n, g] * (code[n, k] - zero[n, g])."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anybit.formats.affine import Affine
from anybit.formats.bipolar import Bipolar
from anybit.formats.decoder import Decoder, groups, per_column
from anybit.formats.dual_grained import DualGrained
from anybit.formats.nested_affine import NestedAffine
from anybit.integrations.exchange.account import Account


@dataclass(frozen=True)
class Grid:
    """G = ceil(K / group_size); every number is exact.

    Attributes:
        bits: 1..8.
        group_size: columns per scale, at most K.
        codes: uint8 [N, K].
        scale: float32 [N, G], positive.
        zero: float32 [N, G]; a nested or bipolar weight has zeros between codes.
    """

    bits: int
    group_size: int
    codes: Tensor
    scale: Tensor
    zero: Tensor

    @property
    def symmetric(self) -> bool:
        """Whether zero is 2^(bits-1) everywhere."""
        return bool((self.zero == 2 ** (self.bits - 1)).all())

    def values(self) -> Tensor:
        """float32 [N, K]."""
        scale, zero = (per_column(t, self.codes.shape[1], self.group_size) for t in (self.scale, self.zero))
        return scale * (self.codes.float() - zero)

    @property
    def has_integer_zeros(self) -> bool:
        """Whether every zero is a code."""
        return bool((self.zero.round() == self.zero).all()) and bool((self.zero >= 0).all())

    def with_half_scales(self, account: Account, where: str) -> Grid:
        """The same with scales that float16 holds."""
        half = self.scale.half().float()
        if torch.equal(half, self.scale):
            return self
        account.lose("scales of more bits than float16; they are rounded", where)
        return replace(self, scale=half.clamp(2.0**-24, 65504))

    def in_groups(self, size: int) -> Grid:
        """The same in smaller groups of `size`, a divisor of the group size (or of all but a short last group)."""
        if size == self.group_size:
            return self
        columns = self.codes.shape[1]
        at = torch.arange(0, columns, size) // self.group_size
        return replace(self, group_size=size, scale=self.scale[:, at], zero=self.zero[:, at])


def grid(decoder: Decoder, codes: Tensor, bits: int) -> Grid | None:
    """Codes uint8 [N, K] under a decoder read at `bits`; None for decoders whose values are no uniform grid."""
    size = min(getattr(decoder, "group_size", codes.shape[1]), codes.shape[1])
    rows = (codes.shape[0], groups(codes.shape[1], size))
    if isinstance(decoder, NestedAffine):
        scale, zero = decoder.grid(bits)
        step = 2 ** (decoder.bits - bits)
        fraction = (2 * zero.float() - (step - 1)) / (2 * step)
        return Grid(bits, size, codes >> (decoder.bits - bits), scale.float() * step, fraction)
    if isinstance(decoder, Affine):
        zero = torch.full(rows, 2.0 ** (bits - 1)) if decoder.zero is None else decoder.zero.float()
        return Grid(bits, size, codes, decoder.scale.float(), zero)
    if isinstance(decoder, Bipolar):
        return Grid(bits, size, codes, 2 * decoder.scale.float(), torch.full(rows, (2**bits - 1) / 2))
    if isinstance(decoder, DualGrained):
        scale = decoder.channel_scale.float() * decoder.group_scale.float()
        return Grid(bits, size, codes, scale, decoder.group_zero.float())
    return None
