"""What `linear_bf16` computes, in plain PyTorch; op.py has the contract."""

from __future__ import annotations

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x float [T, K] @ weight^T (bfloat16 [N, K]), computed in float32: float32 [T, N]."""
    return torch.nn.functional.linear(x.float(), weight.float())
