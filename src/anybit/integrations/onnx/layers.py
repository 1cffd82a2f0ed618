"""What stands in the model while it is traced: layers whose arithmetic onnxruntime has operators for."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from anybit.formats.decoder import groups
from anybit.integrations.exchange.account import Account
from anybit.integrations.exchange.grid import Grid

WIDTHS = (2, 4, 8)
BLOCKS = (256, 128, 64, 32, 16)


class PackedLinear(nn.Module):
    """com.microsoft::MatMulNBits: y = x W^T, value = scale * (code - zero).

    `b` uint8 [N, blocks, block bits / 8], low bits first; `scale` float32 [N, blocks]; `zero` uint8 [N, ceil(blocks bits / 8)],
    packed alike, or float32 [N, blocks] where zeros lie between codes.
    """

    def __init__(self, grid: Grid, bias: Tensor | None, account: Account, where: str) -> None:
        """Raises InputError for groups that no block size divides."""
        super().__init__()
        rows, columns = grid.codes.shape
        self.sizes = {"K": columns, "N": rows, "bits": next(width for width in WIDTHS if width >= grid.bits)}
        block = next((size for size in BLOCKS if grid.group_size % size == 0), 0)
        if grid.group_size >= columns and not block:
            block = BLOCKS[-1]
            grid = Grid(grid.bits, groups(columns, block) * block, grid.codes, grid.scale, grid.zero)
        if not block:
            raise account.refuse(
                f"groups of {grid.group_size} columns; blocks of {', '.join(map(str, BLOCKS))} are", where
            )
        self.sizes["block_size"] = block
        cut = grid.in_groups(block)
        count = groups(columns, block)
        padded = torch.nn.functional.pad(cut.codes, (0, count * block - columns)).reshape(rows * count, block)
        bits = self.sizes["bits"]
        self.b: Tensor
        self.scale: Tensor
        self.zero: Tensor
        self.bias: Tensor | None
        self.register_buffer("b", _dense(padded, bits).reshape(rows, count, -1))
        self.register_buffer("scale", cut.scale.contiguous())
        whole = torch.equal(cut.zero.round(), cut.zero)
        self.register_buffer("zero", _dense(cut.zero.to(torch.uint8), bits) if whole else cut.zero.contiguous())
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x float32 [..., K] -> [..., N]."""
        inputs = [x, self.b, self.scale, self.zero]
        shape = [*x.shape[:-1], self.sizes["N"]]
        y: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits", inputs, {**self.sizes}, dtype=x.dtype, shape=shape, version=1
        )
        return y if self.bias is None else y + self.bias


class PackedEmbedding(nn.Module):
    """Rows of codes, looked up and decoded with plain operators."""

    def __init__(self, grid: Grid, output_scale: float) -> None:
        super().__init__()
        self.output_scale = output_scale
        self.group: Tensor  # of every column
        self.codes: Tensor
        self.scale: Tensor
        self.zero: Tensor
        self.register_buffer("group", torch.arange(grid.codes.shape[1]) // grid.group_size)
        self.register_buffer("codes", grid.codes)
        self.register_buffer("scale", grid.scale)
        self.register_buffer("zero", grid.zero)

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [...] -> float32 [..., H]."""
        scale, zero = (table[ids][..., self.group] for table in (self.scale, self.zero))
        return (self.codes[ids].float() - zero) * scale * self.output_scale


def _dense(table: Tensor, bits: int) -> Tensor:
    """uint8 [R, C] of `bits` bits each to uint8 [R, ceil(C bits / 8)], low bits first."""
    per_byte = 8 // bits
    rows, columns = table.shape
    padded = torch.nn.functional.pad(table, (0, -columns % per_byte)).numpy().reshape(rows, -1, per_byte)
    shifts = (np.arange(per_byte) * bits).astype(np.uint8)
    return torch.from_numpy((padded << shifts).sum(-1, dtype=np.uint8))
