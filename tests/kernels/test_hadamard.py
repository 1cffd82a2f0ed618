"""Walsh-Hadamard: the explicit matrix, orthogonal, its own inverse, the same bits everywhere."""

from __future__ import annotations

import pytest
import torch

from anybit.errors import FormatError, KernelUnavailable
from anybit.kernels.hadamard import op, reference
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
