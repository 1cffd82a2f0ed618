"""What `quantize_activations` computes, in plain PyTorch; op.py has the contract."""

from __future__ import annotations

import torch
from torch import Tensor

from anybit.formats.decoder import by_group

LINE = 64  # codes are padded with zeros to whole lines, so that kernels may read whole vectors
SMALLEST = 2.0**-100  # the largest magnitude from which a group has codes; 127 / it is far from overflow


def stride(columns: int) -> int:
    """Columns of the codes of rows of `columns` values: an odd number of lines (`activation_stride` in cpu.h says why)."""
    return (-(-columns // LINE) | 1) * LINE


def quantize(x: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """x float32 [T, K] to codes int8 [T, stride(K)], scale float32 [T, G], sums float32 [T, G]."""
    grouped = by_group(x, min(group_size, x.shape[1]))
    reach = grouped.abs().amax(-1, keepdim=True)
    usable = (reach >= SMALLEST) & reach.isfinite()
    factor = torch.where(usable, 127 / reach, torch.zeros_like(reach))
    codes = torch.where(usable, (grouped * factor).round(), torch.zeros_like(grouped)).clamp(-127, 127)
    scale = torch.where(usable, reach / 127, torch.where(reach.isfinite(), 0.0, torch.nan)).squeeze(-1)
    rows, columns = x.shape
    padded = torch.zeros(rows, stride(columns), dtype=torch.int8)
    padded[:, :columns] = codes.flatten(1)[:, :columns].to(torch.int8)
    return padded, scale, codes.sum(-1)


def rms_norm(x: Tensor, weight: Tensor | None, plus_one: bool, eps: float) -> Tensor:
    """x float32 [T, K] / sqrt(mean(x^2) + eps) * weight, or * (1 + weight) with `plus_one`."""
    mean = x.square().mean(-1, keepdim=True)
    y = x * torch.where(mean.isfinite(), 1 / torch.sqrt(mean + eps), torch.nan)
    if weight is None:
        return y
    return y * (1 + weight if plus_one else weight)


def gate(gate_up: Tensor, activation: str) -> Tensor:
    """gate_up float32 [T, 2F]: act(first half) * second half."""
    gates, ups = gate_up.chunk(2, -1)
    if activation == "silu":
        return torch.nn.functional.silu(gates) * ups
    return torch.nn.functional.gelu(gates, approximate="tanh") * ups
