"""linear_w_bf16: decoded weights and products against float64, and what a token may depend on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from anybit.errors import FormatError, KernelUnavailable
from anybit.kernels.linear_w_bf16 import op, reference
from anybit.kernels.native import set_threads
from integer_case import Case

SHAPES = [
    (1, 1, 1),
    (3, 31, 31),
    (16, 32, 32),
    (17, 33, 32),
    (33, 64, 64),
    (40, 257, 257),
    (83, 576, 32),
    (65, 1536, 128),
]


@pytest.fixture
def unit():
    if reason := op.refusal():
        pytest.skip(reason)


@pytest.mark.parametrize("bits", range(1, 9))
def test_products_stay_within_their_bound(unit, bits):
    for rows, columns, group in SHAPES:
        for tokens in (1, 15, 16, 17, 32, 33, 70):
            case = Case(bits, rows, columns, group, 1)
            x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))
            weights = reference.weights(case.weight)
            exact = x.bfloat16().double() @ weights.double().T
            # Every addition rounds once, and the unit flushes what is below 2^-126.
            bound = columns * (2.0**-24 * 1.01 * (x.bfloat16().double().abs() @ weights.double().abs().T) + 2.0**-125)
            assert bool(((op.linear(x, case.weight, "native").double() - exact).abs() <= bound).all()), (
                rows,
                columns,
                tokens,
            )


def test_reference_weights_are_the_decoded_ones():
    case = Case(4, 20, 96, 32, 1)
    grid = (case.codes.double() - case.zero.double().repeat_interleave(32, 1)) * case.scale.double().repeat_interleave(
        32, 1
    )
    error = (reference.weights(case.weight).double() - grid).abs()
    # Half a unit in the last place of bfloat16, plus the rounding of scale * zero.
    assert bool((error <= 2.0**-8 * grid.abs() + 2.0**-23 * 16 * case.scale.double().repeat_interleave(32, 1)).all())


def test_a_token_depends_on_itself_alone(unit):
    case = Case(4, 83, 576, 32, 1)
    x = torch.randn(77, 576)
    whole = op.linear(x, case.weight)
    for threads in (1, 2, 3):
        set_threads(threads)
        assert torch.equal(op.linear(x, case.weight), whole)
    for start, stop in ((0, 1), (3, 20), (20, 77)):
        assert torch.equal(op.linear(x[start:stop], case.weight), whole[start:stop])
    x[5] = torch.nan
    mixed = op.linear(x, case.weight)
    assert bool(mixed[5].isnan().all())
    assert torch.equal(mixed[6:], whole[6:])


@pytest.mark.parametrize("impl", op.IMPLEMENTATIONS)
def test_rows_of_bfloat16_are_rounded_once_more(unit, impl):
    for rows, columns, group in SHAPES:
        case = Case(4, rows, columns, group, 1)
        for tokens in (1, 17, 40, 2100):
            x = torch.randn(tokens, columns).bfloat16()
            found = op.linear(x, case.weight, impl)
            assert torch.equal(found, op.linear(x.float(), case.weight, impl).bfloat16())


def test_fewer_planes_and_a_moved_grid(unit):
    case = Case(6, 40, 96, 32, 1)
    lower = replace(case.weight, bits=3, scale_mul=8.0, zero_mul=0.125, zero_add=-0.4375)
    x = torch.randn(20, 96)
    torch.testing.assert_close(op.linear(x, lower, "native"), op.linear(x, lower, "reference"), rtol=1e-4, atol=1e-4)


def test_what_cannot_run_says_so(isa):
    case = Case(4, 8, 64, 32, 1)
    if isa != "amx":
        with pytest.raises(KernelUnavailable, match=f"instruction set '{isa}' has no bfloat16 matrix unit"):
            op.linear(torch.ones(1, 64), case.weight, "native")
    with pytest.raises(FormatError, match=r"x must be float32 or bfloat16 \[T, 64\], got torch.float32 \(1, 63\)"):
        op.linear(torch.ones(1, 63), case.weight)
