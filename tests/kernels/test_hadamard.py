"""Walsh-Hadamard: the explicit matrix, orthogonal, its own inverse, the same bits everywhere."""

from __future__ import annotations

import pytest
import torch

from anybit.errors import FormatError, KernelUnavailable
from anybit.kernels.hadamard import op, reference
from anybit.kernels.hadamard.orders import LARGEST, known, order, sizes_for
from anybit.kernels.native import native, set_threads

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 1024, 4096, 3, 6, 12, 40, 576, 1536)


def values(*shape):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(shape[-1]))
    x[..., :: max(1, shape[-1] // 3)] *= 100
    return x


def test_matrix_is_the_definition_and_orthogonal():
    for block in (1, 2, 4, 8, 16, 64):
        matrix = reference.matrix(block)
        signs = [[(-1.0) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
        assert torch.equal(matrix, torch.tensor(signs, dtype=torch.float64) / block**0.5)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(block, dtype=torch.float64))


@pytest.mark.parametrize("columns", SIZES)
def test_equal_to_the_matrix_orthogonal_and_involution(isa, columns):
    x = values(5, columns)
    y = op.hadamard_(x.clone(), impl="native")
    bound = 4e-7 * float(x.norm(dim=-1).max())
    assert float((y - reference.transform(x.double(), op.largest_block(columns))).abs().max()) < bound
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert float((op.hadamard_(y, impl="native") - x).abs().max()) < bound


def test_integers_are_exact(isa):
    """sqrt(block) is a power of two for block = 4^m: sums of small integers leave no rounding at all."""
    for columns, block in ((64, 64), (1024, 1024), (576, 64), (192, 16), (32, 4), (8, 1)):
        x = torch.randint(-8, 9, (3, columns), generator=torch.Generator().manual_seed(columns)).float()
        assert torch.equal(op.hadamard_(x.clone(), block, impl="native"), reference.transform(x, block))


def test_same_bits_everywhere_and_threads():
    module = native()
    assert module
    x, before, results = values(100, 1536), (module.isa(), module.threads()), []
    for isa in module.available_isas():
        module.set_isa(isa)
        for threads in (1, 2, 5):
            set_threads(threads)
            results.append(op.hadamard_(x.clone()))
    module.set_isa(before[0])
    set_threads(before[1])
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_in_place_and_registered():
    x = values(2, 3, 64)
    want = reference.transform(x, 64)
    assert op.hadamard_(x) is x
    torch.testing.assert_close(x, want)
    torch.library.opcheck(op.hadamard_op, (values(2, 64), 64))


def test_wrong_input_is_refused():
    with pytest.raises(FormatError, match="contiguous float32"):
        op.hadamard_(values(4, 8).T)
    with pytest.raises(FormatError, match="contiguous float32"):
        op.hadamard_(values(4, 8).half())
    for block in (3, 16, 0):
        with pytest.raises(FormatError, match=f"power of two that divides 24, got {block}"):
            op.hadamard_(values(4, 24), block)
    with pytest.raises(KernelUnavailable, match="known: native, reference"):
        op.hadamard_(values(4, 8), impl="magic")


def test_every_order_is_a_hadamard_matrix():
    found = [m for m in range(1, LARGEST + 1) if known(m)]
    assert set(found) >= {1, 12, 20, 28, 36, 44, 60, 68, 76, 84, 108, 124, 132, 140, 148, 228, 252}
    assert not {2, 4, 52, 92, 100, 116, 156, 172, 188} & {m for m in found if m % 8 == 4 and m > 4}
    for m in found:
        matrix = order(m)
        assert torch.equal(matrix.abs(), torch.ones(m, m, dtype=torch.float64))
        assert torch.equal(matrix @ matrix.T, m * torch.eye(m, dtype=torch.float64))
        assert bool((matrix[0] == 1).all() and (matrix[:, 0] == 1).all())
    with pytest.raises(FormatError, match="order 172"):
        order(172)


def test_sizes():
    whole = {64: (1, 64), 576: (36, 16), 1536: (12, 128), 5632: (44, 128), 14336: (28, 512), 13824: (108, 128)}
    whole |= {96: (12, 8), 6: (1, 2)}
    assert {columns: sizes_for(columns) for columns in whole} == whole
    assert sizes_for(11008) == (1, 256)  # 43 * 256: no matrix of order 172 here
    assert sizes_for(4 * 13 * 3 * 8)[0] == 12  # 13 * 4 = 52 is missing, 3 * 4 is there


@pytest.mark.parametrize("sizes", [(12, 8), (36, 16), (28, 1), (1, 64), (20, 4)])
def test_mixed_orders_equal_the_matrix(isa, sizes):
    columns = 2 * sizes[0] * sizes[1]
    x = values(3, 2, columns)
    matrix = torch.block_diag(*[reference.mixed(sizes)] * 2)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(columns, dtype=torch.float64))
    want = x.double() @ matrix
    bound = 1e-6 * float(x.norm(dim=-1).max())
    before = x.clone()
    for y in (
        op.hadamard(x, sizes, impl="native"),
        op.hadamard(x, sizes, impl="reference"),
        reference.factored(x, sizes),
    ):
        assert y.dtype == x.dtype
        assert float((y - want).abs().max()) < bound
    assert torch.equal(x, before)
    torch.testing.assert_close(reference.factored(want, sizes, transpose=True), x.double(), rtol=1e-9, atol=1e-9)
    assert op.hadamard(x.bfloat16(), sizes).dtype == torch.bfloat16
    turned = op.hadamard(x.transpose(0, 1), sizes)
    assert torch.equal(turned, op.hadamard(x, sizes).transpose(0, 1))


def test_gradients_go_back_through_the_transpose():
    x = values(2, 24).requires_grad_()
    op.hadamard(x, (12, 2)).backward(gradient := values(2, 24))
    expected = reference.factored(gradient.double(), (12, 2), transpose=True)
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("sizes", [(12, 3), (52, 1), (12, 16), (0, 8), (3, 2)])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(FormatError, match="no Hadamard transform of sizes"):
        op.hadamard(values(2, 96), sizes)
