"""Float layers: exact on small integers, close to float64 else, tokens independent of each other."""

from __future__ import annotations

import pytest
import torch

from anybit.errors import FormatError, KernelUnavailable
from anybit.kernels.linear_bf16 import op
from anybit.kernels.native import set_threads

SHAPES = ((1, 1), (3, 15), (17, 16), (5, 33), (40, 64), (33, 130), (70, 577))


def parts(tokens, rows, columns, integers=False):
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    if integers:  # every product and sum is an integer below 2^24: float32 has to be exact
        x = torch.randint(-9, 10, (tokens, columns), generator=generator).float()
        return x, torch.randint(-9, 10, (rows, columns), generator=generator).bfloat16()
    x = torch.randn(tokens, columns, generator=generator)
    return x, torch.randn(rows, columns, generator=generator).bfloat16()


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 9])
def test_integers_are_exact(isa, tokens):
    for rows, columns in SHAPES:
        x, weight = parts(tokens, rows, columns, integers=True)
        want = (x.long()[:, None] * weight.long()).sum(-1).float()
        for impl in op.IMPLEMENTATIONS:
            assert torch.equal(op.linear(x, weight, impl=impl), want), (impl, rows, columns)


def test_close_to_float64_and_x_is_not_rounded(isa):
    for rows, columns in SHAPES:
        x, weight = parts(4, rows, columns)
        want = x.double() @ weight.double().T
        for impl in op.IMPLEMENTATIONS:
            error = (op.linear(x, weight, impl=impl) - want).abs().max()
            assert error < 2e-6 * columns**0.5 * 4, (
                impl,
                rows,
                columns,
            )  # rounding x to bfloat16 costs 1000 times more


def test_a_token_depends_on_its_row_alone(isa):
    x, weight = parts(7, 301, 577)
    alone = torch.cat([op.linear(token[None], weight, impl="native-vector") for token in x])
    for threads in (1, 2, 5):
        set_threads(threads)
        assert torch.equal(op.linear(x, weight, impl="native-vector"), alone)


def test_bfloat16_x_and_leading_axes():
    x, weight = parts(12, 20, 66)
    for tokens in (2, 12):
        low = x[:tokens].bfloat16().view(2, -1, 66)
        y = op.linear(low, weight)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.double(), low.double() @ weight.double().T, rtol=1e-2, atol=1e-2)


def test_views_and_the_registered_operator():
    x, weight = parts(4, 40, 66)
    x, weight = x[::2, 2:], weight[1:, 2:]
    torch.testing.assert_close(op.linear(x, weight), x @ weight.float().T)
    torch.library.opcheck(op.linear_op, (x.contiguous(), weight.contiguous()))


def test_wrong_input_is_refused():
    x, weight = parts(2, 3, 8)
    with pytest.raises(FormatError, match="weight must be bfloat16"):
        op.linear(x, weight.float())
    with pytest.raises(FormatError, match=r"\(2, 7\)"):
        op.linear(x[:, 1:], weight)
    with pytest.raises(FormatError, match="x must be float32 or bfloat16"):
        op.linear(x.half(), weight)
    with pytest.raises(KernelUnavailable, match="known: native-vector, torch, reference"):
        op.linear(x, weight, impl="magic")
