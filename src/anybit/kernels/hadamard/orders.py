"""Hadamard matrices whose order is not a power of two: H of order m has entries +-1 and H H^T = m I.

Paley's two constructions from the quadratic residues of a prime q: I of order q + 1 (q = 3 mod 4), II of order
2 (q + 1) (q = 1 mod 4). They give 12, 20, 28, 36, 44, 60, 68, 76, 84, 108, 124, 132, 140, 148, ...; not 52, 92, 100, 116,
156, 172, ... (prime powers and Williamson's construction are not built). Every matrix is checked when it is made, and
has ones in its first row and column.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from anybit.errors import FormatError

LARGEST = 512
"""A factor of order m costs m multiplications a number; beyond this a block transform is the better choice."""

Sizes = tuple[int, int]
"""(m, 2^k): the transform of order n = m 2^k is H_m (x) H_2^k over sqrt(n)."""


@functools.cache
def order(m: int) -> Tensor:
    """A Hadamard matrix of order m, float64 [m, m] of +-1. Raises FormatError where none is known here."""
    if m == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    signs = _paley(m)
    if signs is None:
        raise FormatError(f"no Hadamard matrix of order {m} is built in; use a block-diagonal transform")
    signs = signs * signs[:1]
    signs = signs * signs[:, :1]
    assert torch.equal(signs @ signs.T, m * torch.eye(m, dtype=torch.float64)), m
    return signs


def known(m: int) -> bool:
    """Whether `order(m)` exists."""
    return m == 1 or (m <= LARGEST and m % 4 == 0 and (_prime(m - 1) or (m % 8 == 4 and _prime(m // 2 - 1))))


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


def _paley(m: int) -> Tensor | None:
    if m % 4 == 0 and _prime(m - 1):
        conference = _bordered(m - 1)  # skew-symmetric, as q = 3 mod 4
        return conference + torch.eye(m, dtype=torch.float64)
    if m % 8 == 4 and _prime(m // 2 - 1):
        conference = _bordered(m // 2 - 1)  # symmetric, as q = 1 mod 4
        one = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
        zero = torch.tensor([[1, -1], [-1, -1]], dtype=torch.float64)
        return torch.kron(conference, one) + torch.kron(torch.eye(m // 2, dtype=torch.float64), zero)
    return None


def _bordered(q: int) -> Tensor:
    """The conference matrix of order q + 1: Q[i, j] = legendre(i - j) with a border of ones, 0 on the diagonal."""
    residues = {i * i % q for i in range(1, q)}
    legendre = torch.tensor([0.0] + [1.0 if i in residues else -1.0 for i in range(1, q)], dtype=torch.float64)
    index = torch.arange(q)
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[1:, 1:] = legendre[(index[:, None] - index[None, :]) % q]
    matrix[0, 1:] = 1.0
    matrix[1:, 0] = 1.0 if q % 4 == 1 else -1.0
    return matrix


def _prime(q: int) -> bool:
    return q > 2 and all(q % i for i in range(2, int(q**0.5) + 1))
