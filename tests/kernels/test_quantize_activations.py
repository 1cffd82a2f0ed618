"""int8 activations: equal to the definition bit for bit on every instruction set, rows alone, NaN detected."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from anybit.errors import FormatError, KernelUnavailable
from anybit.kernels.native import native, set_threads
from anybit.kernels.quantize_activations import op, reference

COLUMNS = (1, 3, 31, 32, 33, 64, 65, 130, 576, 1031)
GROUPS = (32, 64, 128, 1 << 20)


def activations(tokens: int, columns: int, seed: int = 0) -> Tensor:
    """Rows of very different size with outliers, exact ties of rounding and both signs."""
    generator = torch.Generator().manual_seed(seed + columns)
    x = torch.randn(tokens, columns, generator=generator) * torch.logspace(-6, 6, tokens)[:, None]
    x[:, ::7] *= 50
    ties = torch.randint(-127, 127, (columns,), generator=generator) + 0.5
    ties[:: min(columns, 32)] = 127  # every group reaches 127, so the factor is 1 and the rest are exact ties
    x[0] = ties
    return x


def oracle(x: Tensor, group_size: int) -> tuple[list[list[int]], list[list[float]]]:
    """Codes and scales one number at a time: Python's round() is to even, float32 arithmetic through torch scalars."""
    codes, scales = [], []
    for row in x:
        parts = row.split(min(group_size, len(row)))
        reach = [part.abs().max() for part in parts]
        scales.append([float(amax / 127) for amax in reach])
        codes.append([round(float(v * (127 / amax))) for part, amax in zip(parts, reach, strict=True) for v in part])
    return codes, scales


def same(first: op.Quantized, second: op.Quantized) -> None:
    for a, b in zip(first, second, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(a.nan_to_num(-7.5), b.nan_to_num(-7.5))


def test_reference_is_the_definition():
    for columns, group in itertools.product((3, 65, 130), (32, 1 << 20)):
        x = activations(4, columns)
        codes, scale, sums = reference.quantize(x, group)
        want, scales = oracle(x, group)
        assert codes[:, :columns].tolist() == want
        assert scale.tolist() == scales
        assert not codes[:, columns:].any()
        exact = [[sum(part.tolist()) for part in row.split(min(group, columns))] for row in codes[:, :columns]]
        assert sums.tolist() == exact


def test_codes_equal_the_reference(isa):
    for columns, group in itertools.product(COLUMNS, GROUPS):
        x = activations(5, columns)
        same(op.quantize(x, group, impl="native"), reference.quantize(x, group))


def test_zero_tiny_nan_and_infinite_groups(isa):
    x = activations(6, 130)
    x[1] = 0
    x[2, 64:] = 1e-38
    x[3, 70], x[4, 129], x[5, 0] = torch.nan, torch.inf, -torch.inf
    for group in (32, 1 << 20):
        found = op.quantize(x, group, impl="native")
        same(found, reference.quantize(x, group))
        codes, scale, _ = found
        assert (scale[1] == 0).all()
        assert (scale[3:].isnan().sum(1) == 1).all()
        assert not codes[3:, :130][scale[3:].isnan().repeat_interleave(min(group, 130), 1)[:, :130]].any()
    assert op.quantize(x, 32, impl="native")[1][2, 2] == 0


@pytest.mark.parametrize("plus_one", [False, True])
def test_rms_norm_is_close_to_float64(isa, plus_one):
    for columns in COLUMNS:
        x, weight = activations(5, columns)[1:], activations(1, columns, 9)[0] / 127
        y = op.rms_norm(x, weight, plus_one, 1e-5, impl="native")
        wide = reference.rms_norm(x.double(), weight.double(), plus_one, 1e-5)
        torch.testing.assert_close(y.double(), wide, rtol=1e-6, atol=0)
        torch.testing.assert_close(reference.rms_norm(x, weight, plus_one, 1e-5).double(), wide, rtol=2e-6, atol=0)
        found = op.rms_norm_quantize(x, weight, plus_one, 1e-5, 32, impl="native")
        same(found, reference.quantize(y, 32))


def test_rms_norm_without_weight_and_of_bad_rows(isa):
    x = activations(4, 65)
    torch.testing.assert_close(op.rms_norm(x, None, False, 0.0), reference.rms_norm(x, None, False, 0.0))
    x[1, 3], x[2, 5], x[3, 64] = torch.nan, torch.inf, 1e25
    _, scale, _ = op.rms_norm_quantize(x, None, False, 1e-6, 32, impl="native")
    assert scale[0].isfinite().all()
    assert scale[1:].isnan().all()


@pytest.mark.parametrize("activation", op.ACTIVATIONS)
def test_gates_are_close_to_float64(isa, activation):
    generator = torch.Generator().manual_seed(3)
    gates = torch.cat([torch.linspace(-40, 40, 4001), torch.randn(96, generator=generator)])
    gate_up = torch.cat([gates, torch.randn(len(gates), generator=generator)])[None]
    y = op.gate(gate_up, activation, impl="native").double()
    g, up = gate_up.double().chunk(2, -1)
    z = g if activation == "silu" else 2 * (2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3)
    wide = g * torch.sigmoid(z) * up
    near = z > -20  # further down gelu's own argument, rounded to float32, decides the relative error
    torch.testing.assert_close(y[near], wide[near], rtol=2e-6 if activation == "gelu_tanh" else 5e-7, atol=0)
    assert float((y - wide).abs()[~near].max()) < 1e-12
    found = op.gate_quantize(gate_up, activation, 64, impl="native")
    same(found, reference.quantize(op.gate(gate_up, activation, impl="native"), 64))


@pytest.mark.parametrize("activation", op.ACTIVATIONS)
def test_gates_at_the_edges(isa, activation):
    gate_up = torch.tensor([[0.0, 300.0, -300.0, 3e38, -3e38, torch.nan], [2.0] * 6]).view(1, 12)
    y = op.gate(gate_up, activation, impl="native")[0]
    assert y[:3].tolist() == [0, 600, 0]
    assert y[3].isinf()
    assert y[4] == 0
    assert y[5].isnan()
    scale = op.gate_quantize(gate_up[:, :], activation, 32, impl="native")[1]
    assert scale.isnan().all()


def test_every_instruction_set_gives_the_same_bits():
    module = native()
    assert module
    before, results = module.isa(), []
    for isa in module.available_isas():
        module.set_isa(isa)
        x = activations(5, 1031)
        floats = op.rms_norm(x, None, False, 1e-6), op.gate(x[:, :1030], "silu")
        normed = op.rms_norm_quantize(x, x[1], True, 1e-6, 64)
        results.append((*floats, *normed, *op.gate_quantize(x[:, :1030], "gelu_tanh", 32)))
    module.set_isa(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_token_depends_on_its_row_alone(isa):
    x = activations(300, 320)
    alone = [op.rms_norm_quantize(row[None], x[1], False, 1e-5, 32) for row in x]
    for threads in (1, 2, 5):
        set_threads(threads)
        together = op.rms_norm_quantize(x, x[1], False, 1e-5, 32)
        for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
            assert torch.equal(whole, torch.cat(parts))


def test_views_and_the_registered_operator():
    x = activations(8, 260)[::2, 4:]
    same(op.quantize(x, 64), reference.quantize(x.contiguous(), 64))
    torch.library.opcheck(op.quantize_op, (x.contiguous(), 64))
    torch.library.opcheck(op.quantize_op, (x.contiguous(), 1 << 20))


def test_wrong_input_is_refused():
    x = activations(2, 64)
    with pytest.raises(FormatError, match="must be float32"):
        op.quantize(x.half(), 32)
    with pytest.raises(FormatError, match="multiple of 32 or at least 64"):
        op.quantize(x, 48)
    with pytest.raises(FormatError, match="at most 132104 columns"):
        op.quantize(torch.zeros(1, 140000), 140000)
    with pytest.raises(FormatError, match=r"weight must be float32 \[64\]"):
        op.rms_norm_quantize(x, x[0, :3], False, 1e-5, 32)
    with pytest.raises(FormatError, match="no activation 'relu'; known: silu, gelu_tanh"):
        op.gate_quantize(x, "relu", 32)
    with pytest.raises(KernelUnavailable, match="known: native, reference"):
        op.quantize(x, 32, impl="magic")
