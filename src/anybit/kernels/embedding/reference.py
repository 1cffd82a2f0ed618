"""What `embedding` computes, in plain PyTorch; op.py has the contract."""

from __future__ import annotations

from torch import Tensor

from anybit.formats.affine import Affine
from anybit.formats.planes import unpack


def embed(
    ids: Tensor,
    planes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_size: int,
    columns: int,
    multiplier: float,
) -> Tensor:
    """ids int64 [T] to float32 [T, H]."""
    picked = Affine(planes.shape[0], group_size, scale[ids], None if zero is None else zero[ids])
    return picked.decode(unpack(planes[:, ids], columns)) * multiplier
