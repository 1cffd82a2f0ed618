"""The orthogonal change of basis of a residual stream: what readers, writers and tables become under x -> x Q."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anybit.errors import StructureError
from anybit.kernels.hadamard.orders import Sizes, sizes_for
from anybit.kernels.hadamard.reference import factored

_ROWS = 4096


@dataclass(frozen=True)
class Stream:
    """Q [H, H], orthogonal and never made: D S for RMS norms, S^T D S for layer norms; S = Hadamard / sqrt(H), D = signs.

    An RMS norm of gain 1 commutes with every rotation. A layer norm also subtracts the mean, so its Q has to leave the vector
    of ones where it is: S turns that one into the first unit vector, whose sign D keeps.

    Attributes:
        sizes: of S, which is block-diagonal where no Hadamard matrix has order H.
        signs: float64 [H] of +-1.
        centred: whether the norms are layer norms.
    """

    sizes: Sizes
    signs: Tensor
    centred: bool

    @classmethod
    def of(cls, width: int, centred: bool, random: bool, seed: int) -> Stream:
        """Q for a stream of `width`; the signs are all 1 unless `random` (layer norms always draw them: S^T S is nothing)."""
        sizes, signs = sizes_for(width), torch.ones(width, dtype=torch.float64)
        if random or centred:
            draw = torch.Generator().manual_seed(seed)
            signs = torch.randint(0, 2, (width,), generator=draw).double() * 2 - 1
        if centred:
            signs[:: sizes[0] * sizes[1]] = 1
        return cls(sizes, signs, centred)

    def turn(self, x: Tensor) -> Tensor:
        """x [..., H] Q in float64: hidden states, table rows, columns of what reads the stream."""
        x = x.double()
        return factored((factored(x, self.sizes, transpose=True) if self.centred else x) * self.signs, self.sizes)

    def back(self, x: Tensor) -> Tensor:
        """x [..., H] Q^T in float64."""
        x = factored(x.double(), self.sizes, transpose=True) * self.signs
        return factored(x, self.sizes) if self.centred else x

    def turn_rows(self, weight: Tensor, gain: Tensor | float = 1.0) -> None:
        """weight [N, H] becomes weight diag(gain) Q, in place; some rows at a time, as a table in float64 is large."""
        for rows in weight.split(_ROWS):
            rows.copy_(self.turn(rows.double() * gain))

    def write(self, linear: nn.Module) -> None:
        """Let a linear whose output is added to the stream write it in the new basis: rows (and bias) turned."""
        weight, bias = linear.get_parameter("weight"), linear._parameters.get("bias")
        weight.copy_(self.turn(weight.T).T)
        if bias is not None:
            bias.copy_(self.turn(bias))


def fold_norm(norm: nn.Module, readers: dict[str, nn.Module], stream: Stream | None) -> None:
    """Move the gain and bias of `norm` into `readers` of its output, by name, and turn their columns to `stream`.

    Products are float64. A bias of the norm goes into the readers' biases; where one of them has none, what stays in the norm
    is bias / gain, turned.

    Raises:
        StructureError: a gain of 0 that would have to divide.
    """
    gain, plain = gain_of(norm)
    bias = norm._parameters.get("bias")
    offset = None if bias is None else bias.double()
    biases = {name: reader._parameters.get("bias") for name, reader in readers.items()}
    if offset is not None and all(found is not None for found in biases.values()):
        for name, reader in readers.items():
            biases[name].add_(reader.get_parameter("weight").double() @ offset)  # type: ignore[union-attr]
        offset = torch.zeros_like(offset)
    for reader in readers.values():
        weight = reader.get_parameter("weight")
        if stream is None:
            weight.copy_(weight.double() * gain)
        else:
            stream.turn_rows(weight, gain)
    norm.get_parameter("weight").fill_(1.0 if plain else 0.0)
    if bias is not None and offset is not None:
        if bool(((gain == 0) & (offset != 0)).any()):
            raise StructureError(
                f"a {type(norm).__name__} has a gain of 0 with a bias, and its readers have none to take it"
            )
        left = torch.where(gain == 0, 0.0, offset / gain)
        bias.copy_(left if stream is None else stream.turn(left))


def gain_of(norm: nn.Module) -> tuple[Tensor, bool]:
    """What a norm multiplies by, float64 [H], and whether that is its weight itself (Gemma's is 1 + weight)."""
    weight, bias = norm.get_parameter("weight"), norm._parameters.get("bias")
    probe = torch.randn(1, 1, len(weight), generator=torch.Generator().manual_seed(0))
    saved = weight.clone()
    weight.zero_()
    out = norm(probe) if bias is None else norm(probe) - bias
    weight.copy_(saved)
    plain = float(out.abs().max()) < 1e-3
    return (saved.double() if plain else 1 + saved.double()), plain
