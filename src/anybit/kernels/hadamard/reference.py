"""What `hadamard` computes, by explicit matrices in float64; op.py has the contract."""

from __future__ import annotations

import torch
from torch import Tensor

from anybit.kernels.hadamard.orders import Sizes, order


def matrix(block: int) -> Tensor:
    """The Sylvester-Hadamard matrix float64 [block, block] over sqrt(block), by doubling: [[H, H], [H, -H]]."""
    signs = torch.ones(1, 1, dtype=torch.float64)
    while len(signs) < block:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    return signs / block**0.5


def transform(x: Tensor, block: int) -> Tensor:
    """x float [..., n] with every `block` neighbours multiplied by `matrix(block)`; in the dtype of x."""
    return (x.double().unflatten(-1, (-1, block)) @ matrix(block)).flatten(-2).to(x.dtype)


def mixed(sizes: Sizes) -> Tensor:
    """The orthogonal matrix float64 [n, n] of order n = m 2^k: H_m (x) H_2^k over sqrt(n)."""
    m, block = sizes
    return torch.kron(order(m) / m**0.5, matrix(block))


def factored(x: Tensor, sizes: Sizes, transpose: bool = False) -> Tensor:
    """x [..., K] @ blocks of `mixed(sizes)` (or of its transpose) without ever making that matrix; in the dtype of x, and
    differentiable. In float64 this is what folds rotations into weights."""
    m, block = sizes
    low = 1 << (block.bit_length() - 1) // 2
    parts = [order(m) / m**0.5, matrix(block // low), matrix(low)]  # a power of two is two smaller ones, side by side
    shape = (*x.shape[:-1], -1, m, block // low, low)
    first, second, third = (part.to(x) for part in (parts[0].T if transpose else parts[0], *parts[1:]))
    y = x.reshape(shape) @ third
    y = (y.transpose(-1, -2) @ second).transpose(-1, -2)
    if m > 1:
        y = torch.einsum("...mab,mn->...nab", y, first)
    return y.reshape(x.shape)
