"""Which orders m 2^k the Hadamard transform takes, and which one rows of a given length get.

Matrices of `matrices.py` give m = 12, 20, 28, 36, 44, 60, 68, 76, 84, 108, 124, 132, 140, 148, ...; not 52, 92, 100, 116, 156,
172, ... (prime powers and Williamson's construction are not built).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from anybit.kernels.hadamard.matrices import matrix, paley

LARGEST = 512
"""A factor of order m costs m multiplications a number; beyond this a block transform is the better choice."""

Sizes = tuple[int, int]
"""(m, 2^k): the transform of order n = m 2^k is H_m (x) H_2^k over sqrt(n)."""


def order(m: int) -> Tensor:
    """A Hadamard matrix of order m, float64 [m, m] of +-1. Raises FormatError where none is known here."""
    return torch.from_numpy(matrix(m)).double()


def known(m: int) -> bool:
    """Whether `order(m)` exists."""
    return m == 1 or (m <= LARGEST and paley(m) != 0)


@functools.cache
def sizes_for(columns: int) -> Sizes:
    """(m, 2^k) for rows of `columns`: the largest order m 2^k that divides them, all of them where that can be; the blocks
    of that order are not mixed with one another."""
    power = columns & -columns
    odd = columns // power
    found = [(1, power)]
    for part in range(3, odd + 1, 2):
        if odd % part == 0 and power >= 4 and known(4 * part):
            found.append((4 * part, power // 4))
    return max(found, key=lambda sizes: sizes[0] * sizes[1])
