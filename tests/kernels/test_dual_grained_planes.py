"""Dual-grained weights at their own width: int32 sums equal int64, and results equal those of the byte form bit for bit."""

from __future__ import annotations

import pytest
import torch

from anybit.errors import FormatError
from anybit.formats.dual_grained import DualGrained
from anybit.formats.planes import pack
from anybit.kernels import native
from anybit.kernels.linear_w_a8 import op, stored
from anybit.kernels.linear_w_a8.tiles import MAX_COLUMNS
from integer_case import every_machine

pytestmark = pytest.mark.skipif(native.native() is None, reason="anybit._native is not built")
TOKENS = (1, 2, 7, 9, 16, 33, 150)


def weight(rows: int, columns: int, bits: int, group: int) -> tuple[torch.Tensor, DualGrained]:
    """Inner products that come to both ends of int8, random zeros."""
    draw = torch.Generator().manual_seed(rows + columns * 7 + bits)
    count = -(-columns // group)
    zero = torch.randint(0, 2**bits, (rows, count), dtype=torch.uint8, generator=draw)
    if bits == 8:  # a byte leaves one choice
        zero[:] = 128
    widest = torch.maximum(zero.int(), 2**bits - 1 - zero.int()).clamp_min(1)
    scale = (127 // widest).clamp_min(1).to(torch.uint8)
    channel = (torch.rand(rows, 1, generator=draw) + 0.1).half()
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=draw)
    codes[0] = 2**bits - 1
    return codes, DualGrained(bits, group, channel, scale, zero)


def tiled(codes: torch.Tensor, made: DualGrained, reach: int | None) -> op.Tiled:
    saved = {"weight": pack(codes, made.bits), **made.tensors()}
    arrays = {name: tensor.numpy() for name, tensor in saved.items()}
    return op.of_numpy(stored.tile(made.form(), [arrays], codes.shape[1], reach))


def inputs(tokens: int, columns: int, group: int) -> tuple[op.Quantized, op.Quantized]:
    """The same activations for planes and for bytes: one scale a token, sums per group and per row; extreme codes."""
    draw = torch.Generator().manual_seed(tokens + columns)
    whole = op.quantize(torch.randn(tokens, columns, generator=draw), columns)
    whole.codes[-1, :columns] = -127
    parts = [part.long().sum(1) for part in whole.codes[:, :columns].split(group, 1)]
    sums = torch.stack(parts, 1).float()
    rows = op.Quantized(whole.codes, whole.scale, sums.sum(1, keepdim=True))
    return op.Quantized(whole.codes, whole.scale.expand(-1, len(parts)).contiguous(), sums), rows


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(("rows", "columns", "group"), [(1, 33, 32), (35, 257, 64), (48, 576, 128), (17, 96, 96)])
def test_sums_equal_int64_and_results_those_of_bytes(bits: int, rows: int, columns: int, group: int) -> None:
    codes, made = weight(rows, columns, bits, group)
    planes, as_bytes = tiled(codes, made, columns), tiled(codes, made, None)
    assert planes.grain is not None
    assert as_bytes.grain is None
    assert (planes.bits, as_bytes.bits) == (bits, 8)
    inner = made.integer(codes).long()
    for _ in every_machine():
        for tokens in TOKENS:
            x, x_rows = inputs(tokens, columns, group)
            exact = x.codes[:, :columns].long() @ inner.T
            assert torch.equal(op.sums(x, planes)[:, 0].long(), exact)
            y = op.linear_quantized(x, planes)
            assert torch.equal(y, op.linear_quantized(x_rows, as_bytes))
            wanted = exact.float() * (made.channel_scale.float().T * x.scale[:, :1])
            assert torch.allclose(y, wanted, rtol=3e-7, atol=0)


def test_a_token_alone() -> None:
    codes, made = weight(40, 320, 4, 64)
    planes, (x, _) = tiled(codes, made, 320), inputs(90, 320, 64)
    for _ in every_machine():
        whole = op.linear_quantized(x, planes)
        for t in (0, 31, 89):
            one = op.Quantized(x.codes[t : t + 1], x.scale[t : t + 1], x.sums[t : t + 1])
            assert torch.equal(op.linear_quantized(one, planes), whole[t : t + 1])


def test_row_sums_are_exact_in_both_layouts() -> None:
    codes, made = weight(35, 300, 4, 64)
    wanted = (made.integer(codes).double().sum(1, keepdim=True) * made.channel_scale.double()).float()
    for reach in (300, None):
        saved = {"weight": pack(codes, 4).numpy(), **{name: t.numpy() for name, t in made.tensors().items()}}
        found = stored.row_sums(stored.tile(made.form(), [saved], 300, reach), 300)
        assert torch.equal(torch.from_numpy(found), wanted)


def test_what_int32_or_int8_cannot_hold_is_refused() -> None:
    part = {"kind": "dual_grained", "bits": 4, "group_size": 128}
    assert f"at most {MAX_COLUMNS}" in stored.nesting_refusal(part, MAX_COLUMNS + 1, MAX_COLUMNS + 1)
    assert stored.nesting_refusal(part, MAX_COLUMNS, MAX_COLUMNS) == ""
    codes, made = weight(20, 64, 4, 32)
    large = DualGrained(4, 32, made.channel_scale, made.group_scale * 0 + 60, made.group_zero)
    with pytest.raises(FormatError, match="outside int8"):
        tiled(codes, large, 64)
