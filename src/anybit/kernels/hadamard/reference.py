"""What `hadamard` computes, by explicit matrices in float64; op.py has the contract."""

from __future__ import annotations

import torch
from torch import Tensor


def matrix(block: int) -> Tensor:
    """The Sylvester-Hadamard matrix float64 [block, block] over sqrt(block), by doubling: [[H, H], [H, -H]]."""
    signs = torch.ones(1, 1, dtype=torch.float64)
    while len(signs) < block:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    return signs / block**0.5


def transform(x: Tensor, block: int) -> Tensor:
    """x float [..., n] with every `block` neighbours multiplied by `matrix(block)`; in the dtype of x."""
    return (x.double().unflatten(-1, (-1, block)) @ matrix(block)).flatten(-2).to(x.dtype)
