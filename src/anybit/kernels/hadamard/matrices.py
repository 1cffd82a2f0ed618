"""Hadamard matrices whose order is not a power of two, by Paley's two constructions. NumPy alone: an engine starts without
PyTorch."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anybit.errors import FormatError

Array = NDArray[Any]


@functools.cache
def matrix(m: int) -> Array:
    """A Hadamard matrix H of order m, float32 [m, m] of +-1 with H H^T = m I and ones in its first row and column.

    From the quadratic residues of a prime q: order q + 1 for q = 3 mod 4, order 2 (q + 1) for q = 1 mod 4.

    Raises:
        FormatError: no such prime.
    """
    if m != 1 and not paley(m):
        raise FormatError(f"no Hadamard matrix of order {m} is built in; use a block-diagonal transform")
    signs = np.ones((1, 1)) if m == 1 else _constructed(m)
    signs = signs * signs[:1]
    signs = signs * signs[:, :1]
    assert np.array_equal(signs @ signs.T, m * np.eye(m)), m
    return np.ascontiguousarray(signs, np.float32)


def paley(m: int) -> int:
    """Which of Paley's constructions gives order m: 1, 2, or 0 for neither."""
    if m % 4 == 0 and _prime(m - 1):
        return 1
    return 2 if m % 8 == 4 and _prime(m // 2 - 1) else 0


def _constructed(m: int) -> Array:
    if paley(m) == 1:
        return _bordered(m - 1) + np.eye(m)  # skew-symmetric plus I
    return np.kron(_bordered(m // 2 - 1), [[1, 1], [1, -1]]) + np.kron(np.eye(m // 2), [[1, -1], [-1, -1]])  # symmetric


def _bordered(q: int) -> Array:
    """The conference matrix of order q + 1: legendre(i - j) with a border of ones, 0 on the diagonal."""
    residues = {i * i % q for i in range(1, q)}
    legendre = np.array([0.0, *(1.0 if i in residues else -1.0 for i in range(1, q))])
    index, bordered = np.arange(q), np.zeros((q + 1, q + 1))
    bordered[1:, 1:] = legendre[(index[:, None] - index[None, :]) % q]
    bordered[0, 1:], bordered[1:, 0] = 1.0, 1.0 if q % 4 == 1 else -1.0
    return bordered


def _prime(q: int) -> bool:
    return q > 2 and all(q % i for i in range(2, int(q**0.5) + 1))
