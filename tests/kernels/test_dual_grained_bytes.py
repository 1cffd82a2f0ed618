"""Dual-grained weights as bytes: the same numbers, and the same integers in the kernel."""

import pytest
import torch

from anybit.errors import FormatError
from anybit.formats.dual_grained import DualGrained
from anybit.formats.planes import pack, unpack
from anybit.kernels import native
from anybit.kernels.linear_w_a8 import op
from anybit.kernels.linear_w_a8.dual_grained import as_bytes
from random_terms import decoder

pytestmark = pytest.mark.skipif(native.native() is None, reason="anybit._native is not built")


def reaching(rows, columns, bits, group):
    """Codes and a decoder whose integer weights come to both ends of int8."""
    torch.manual_seed(rows + columns)
    g = -(-columns // group)
    zero = torch.randint(0, 2**bits, (rows, g), dtype=torch.uint8)
    found = decoder("dual_grained", rows, columns, bits, group)
    widest = torch.maximum(zero.int(), 2**bits - 1 - zero.int()).clamp_min(1)
    made = DualGrained(bits, group, found.channel_scale, (127 // widest).clamp_min(1).to(torch.uint8), zero)
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8), made


def expanded(codes, made):
    """`as_bytes` of tensors."""
    saved = {"weight": pack(codes, made.bits), **made.tensors()}
    arrays = {name: tensor.numpy() for name, tensor in saved.items()}
    planes, scale, zero = as_bytes(arrays, made.group_size, codes.shape[1])
    return torch.from_numpy(planes), torch.from_numpy(scale), zero


@pytest.mark.parametrize(("rows", "columns"), [(1, 3), (33, 65), (600, 129), (48, 576)])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_weight_is_the_same_and_sums_are_exact(rows, columns, bits):
    codes, made = reaching(rows, columns, bits, 32)
    planes, scale, zero = expanded(codes, made)
    bytes_ = unpack(planes, columns).int() - 128
    assert torch.equal(bytes_ * scale.float(), made.decode(codes))
    assert int(bytes_.abs().max()) > 30

    tiled = op.tile(planes, scale, zero, columns, columns)
    x = op.quantize(torch.randn(5, columns), columns)
    exact = x.codes[:, :columns].long() @ unpack(planes, columns).long().T
    assert torch.equal(op.sums(x, tiled)[:, 0].long(), exact)
    expected = (x.codes[:, :columns].double() * x.scale) @ made.decode(codes).double().T
    assert torch.allclose(
        op.linear_quantized(x, tiled).double(), expected, rtol=1e-5, atol=1e-5 * float(expected.std())
    )


def test_what_no_byte_holds_is_refused():
    codes, made = reaching(20, 64, 4, 32)
    large = DualGrained(4, 32, made.channel_scale, made.group_scale * 0 + 60, made.group_zero)
    with pytest.raises(FormatError, match="outside int8"):
        expanded(codes, large)
