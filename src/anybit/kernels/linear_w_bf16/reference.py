"""What `linear_w_bf16` computes, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from anybit.formats.decoder import per_column
from anybit.kernels.linear_w_a8.op import Tiled
from anybit.kernels.linear_w_a8.reference import untile


def weights(w: Tiled) -> Tensor:
    """The weights as the kernel multiplies them: bfloat16 [N, K]."""
    codes = untile(w.planes[: w.bits], w.rows, w.columns)
    scale = _rows(w.scale, w.rows).float() * w.scale_mul
    zero = (
        torch.full_like(scale, w.zero_add)
        if w.zero is None
        else _rows(_bytes(w.zero), w.rows) * w.zero_mul + w.zero_add
    )
    scale, zero = (per_column(table, w.columns, w.group_size) for table in (scale, zero))
    return (scale.double() * codes - (scale * zero).double()).float().bfloat16()


def linear(x: Tensor, w: Tiled) -> Tensor:
    """x float32 [T, K] @ W^T: float32 [T, N]."""
    return x.bfloat16().float() @ weights(w).float().T


def _rows(table: Tensor, rows: int) -> Tensor:
    """[blocks, G, 16] to float32 [N, G]."""
    return table.float().transpose(1, 2).reshape(-1, table.shape[1])[:rows]


def _bytes(zero: Tensor) -> Tensor:
    """Zeros with a byte a row: [blocks, G, 16]."""
    return zero if zero.shape[2] == 16 else torch.cat([zero & 15, zero >> 4], dim=2)
