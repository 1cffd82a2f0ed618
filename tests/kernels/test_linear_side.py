"""The float part beside an integer product: exact where floats are, every row alone, the same bits everywhere."""

from __future__ import annotations

import itertools

import pytest
import torch

from anybit.errors import FormatError
from anybit.kernels.linear_side import op, reference
from anybit.kernels.linear_side.tiles import Side, tile_side
from anybit.kernels.native import set_threads


def tables(rows: int, groups: int, width: int) -> tuple[torch.Tensor, torch.Tensor, Side]:
    draw = torch.Generator().manual_seed(rows * 31 + groups * 7 + width)
    sums, columns = torch.randn(rows, groups, generator=draw), torch.randn(rows, width, generator=draw).half()
    side = tile_side(sums.numpy() if groups else None, columns.numpy() if width else None)
    assert side is not None
    assert side.counts == (groups, width)
    return sums, columns, side


@pytest.mark.parametrize(("groups", "width"), [(1, 0), (0, 3), (4, 33)])
def test_it_is_the_definition(isa: str, groups: int, width: int) -> None:
    for rows, tokens in itertools.product((1, 16, 35), (1, 3, 8, 21)):
        sums, columns, side = tables(rows, groups, width)
        y, beside = torch.randn(tokens, rows), torch.randn(tokens, groups + width)
        wanted = reference.add(y, beside, torch.cat([sums, columns.float()], 1))
        found = op.add_(y.clone(), beside, side)
        assert float((found - wanted).abs().max()) <= 2e-7 * float(wanted.abs().max() + 1)
        # whole numbers: no rounding anywhere
        whole = tile_side(
            sums.round().numpy() if groups else None, columns.float().round().half().numpy() if width else None
        )
        assert whole is not None
        exact = y.round() + beside.round() @ torch.cat([sums, columns.float()], 1).round().T
        assert torch.equal(op.add_(y.round(), beside.round(), whole), exact)


def test_a_row_alone_and_any_number_of_threads(isa: str) -> None:
    _, _, side = tables(515, 2, 30)
    y, beside = torch.randn(67, 515), torch.randn(67, 32)
    alone = torch.cat([op.add_(y[t : t + 1].clone(), beside[t : t + 1], side) for t in range(67)])
    for threads in (1, 2, 5):
        set_threads(threads)
        assert torch.equal(op.add_(y.clone(), beside, side), alone)


def test_shapes_are_checked_and_nothing_is_no_side() -> None:
    _, _, side = tables(5, 1, 2)
    assert tile_side(None, None) is None
    with pytest.raises(FormatError, match=r"float32 \[4, 3\]"):
        op.add_(torch.zeros(4, 5), torch.zeros(4, 2), side)
    with pytest.raises(FormatError, match=r"float32 \[4, 5\]"):
        op.add_(torch.zeros(4, 5).double(), torch.zeros(4, 3), side)
