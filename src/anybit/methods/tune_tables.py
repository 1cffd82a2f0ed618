"""Block-wise training of scales and tables (the last step of AnyBCQ, arXiv 2510.10467), for every decoder that has some.

Once the linears of a block are quantized, and for each precision on its own, the numbers its codes stand for (alphas and
offsets of binary-coded weights, tables of codebooks) are trained to bring the block's output near the float block's on the
same inputs, mean squared error, Adam. Codes and planes stay as they are. Training that did not lower the error of all
calibration samples, after rounding to float16, is dropped.

The paper trains 10 epochs on 512 sequences at a learning rate of 1e-4; here an epoch is the run's own samples and steps are
few, so the rate is larger, and it counts in units of the finest step of each table: a constant 1e-4 would be below notice at
2 bits and above the whole last plane at 8.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from anybit.formats.binary_coded import BinaryCoded
from anybit.formats.codebook import Codebook
from anybit.formats.decoder import Decoder
from anybit.formats.terms import DECODERS, CodeTerm, Term
from anybit.methods.base import Method


class TuneTables(Method):
    """Options: `epochs` over the calibration samples, `batch` samples a step, `lr` in units of a table's finest step (it
    falls to 0 along a line), and `highest`, the precision above which nothing is trained since there is little to gain."""

    name: ClassVar[str] = "tune-tables"
    epochs: int = Field(default=2, ge=1)
    batch: int = Field(default=4, ge=1)
    lr: float = Field(default=0.03, gt=0)
    highest: int = Field(default=4, ge=1, le=8)


class Tunable:
    """A code term whose tables of one precision move: value = start + unit * shift, `shifts` being what is trained.

    shifts: float32 leaves by tensor name, shaped like the tables.
    """

    def __init__(self, term: CodeTerm, codes: Tensor, bits: int) -> None:
        """`codes` uint8: those of `term`, unpacked."""
        self.term, self.bits, self._codes = term, bits, codes
        self._tensors = term.decoder.tensors()
        self._units = finest_steps(term.decoder, bits)
        self.shifts = {key: torch.zeros(self._tensors[key].shape, requires_grad=True) for key in self._units}

    def dense(self) -> Tensor:
        """float32 [N, K] at the present tables; gradients reach `shifts`."""
        start, stop = self.term.columns
        values = self._decoder(round_to_half=False).decode(self._codes, self.bits)
        return torch.nn.functional.pad(values, (start, self.term.shape[1] - stop))

    def rounded(self) -> CodeTerm:
        """The term with the present tables in float16."""
        with torch.no_grad():
            return CodeTerm(self.term.planes, self._decoder(round_to_half=True), self.term.shape, self.term.columns)

    def _decoder(self, round_to_half: bool) -> Decoder:
        moved = {key: self._tensors[key].float() + unit * self.shifts[key] for key, unit in self._units.items()}
        if round_to_half:
            moved = {key: table.to(torch.float16) for key, table in moved.items()}
        form = self.term.decoder.form()
        return DECODERS[form["kind"]].restore(form, self._tensors | moved)


def finest_steps(decoder: Decoder, bits: int) -> dict[str, Tensor]:
    """For each tensor `decoder` reads at precision `bits` and can move: its finest step, broadcastable to it.

    Binary-coded: the size of the last plane of each group. Codebook: the mean gap between neighbours in each row.
    """
    if isinstance(decoder, BinaryCoded) and bits in decoder.alphas:
        finest = decoder.alphas[bits].float().abs()[..., -1]
        offsets = {f"offset{bits}": finest} if decoder.offsets is not None else {}
        return {f"alpha{bits}": finest[..., None], **offsets}
    if isinstance(decoder, Codebook) and bits in decoder.tables:
        table = decoder.tables[bits].float()
        return {f"table{bits}": (table.amax(1, keepdim=True) - table.amin(1, keepdim=True)) / (2**bits - 1)}
    return {}


def tunable(term: Term, bits: int) -> bool:
    """Whether the tables of `term` at precision `bits` can be trained."""
    return isinstance(term, CodeTerm) and bool(finest_steps(term.decoder, bits))
