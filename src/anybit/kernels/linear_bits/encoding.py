"""What the bits of an operand mean: value = sum_i coefficients[i] bit_i + offset, in integers.

Every encoding in use is one choice of these numbers, so one core and one epilogue serve them all. With weight codes
u = sum_i cu_i bit_i, activation codes v likewise, U and V their sums over a group of k columns:

    sum (u + ou)(v + ov) = S + ov U + ou (V + k ov),    S = sum_ij cu_i cv_j popcount(U_i & V_j)
"""

from __future__ import annotations

from dataclasses import dataclass

from anybit.errors import FormatError
from anybit.formats.planes import MAX_BITS

LARGEST_COEFFICIENT = 2**15 - 1  # a product of two stays below 2^31


@dataclass(frozen=True)
class Encoding:
    """`coefficients`: one per plane, first plane (most significant bit) first; `offset`: added to every value."""

    coefficients: tuple[int, ...]
    offset: int = 0

    def __post_init__(self) -> None:
        if not 1 <= len(self.coefficients) <= MAX_BITS:
            raise FormatError(f"an encoding has 1 to {MAX_BITS} planes, got {len(self.coefficients)}")
        if max(abs(c) for c in (*self.coefficients, self.offset)) > LARGEST_COEFFICIENT:
            raise FormatError(f"plane coefficients and offset must be within +-{LARGEST_COEFFICIENT}, got {self}")

    @property
    def bits(self) -> int:
        """Planes."""
        return len(self.coefficients)

    def span(self, offset: int | None = None) -> tuple[int, int]:
        """Least and greatest value; `offset` instead of the encoding's own."""
        low = self.offset if offset is None else offset
        return low + sum(c for c in self.coefficients if c < 0), low + sum(c for c in self.coefficients if c > 0)


def unsigned(bits: int, zero: int = 0) -> Encoding:
    """0..2^bits-1, less a zero point."""
    return Encoding(tuple(1 << i for i in reversed(range(bits))), -zero)


def twos_complement(bits: int) -> Encoding:
    """-2^(bits-1)..2^(bits-1)-1: the top plane counts negatively."""
    return Encoding((-(1 << (bits - 1)), *(1 << i for i in reversed(range(bits - 1)))))


def bipolar(bits: int) -> Encoding:
    """Each bit is -1 or +1 times its power of two: the odd numbers of +-(2^bits-1)."""
    return Encoding(tuple(2 << i for i in reversed(range(bits))), 1 - (1 << bits))


def ternary() -> Encoding:
    """Two disjoint planes, plus and minus."""
    return Encoding((1, -1))
