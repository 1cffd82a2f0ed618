"""A whole layer on integers: what the three kernels give one after the other, bit for bit, in either dtype."""

from __future__ import annotations

import itertools

import pytest
import torch

from anybit.errors import FormatError
from anybit.formats.activation import IntActivations
from anybit.formats.planes import pack
from anybit.kernels.linear_integer import reference
from anybit.kernels.linear_integer.op import IntegerLinear
from anybit.kernels.linear_side.tiles import tile_side
from anybit.kernels.linear_w_a8 import op as linear_w_a8
from anybit.kernels.native import set_threads

SCHEMES = [
    {"bits": 8, "symmetric": True},
    {"bits": 4, "symmetric": False, "clip": 0.9},
    {"bits": 6, "symmetric": False, "rounded_zero": True, "granularity": "group", "group_size": 64},
]


class Case:
    """A random layer; with `floats` columns that bypass."""

    def __init__(
        self, bits: int, rows: int, columns: int, group: int, scheme: dict[str, object], floats: int = 0
    ) -> None:
        draw = torch.Generator().manual_seed(bits * 1009 + rows * 31 + columns)
        self.spec, groups = IntActivations(**scheme), -(-columns // group)
        self.bypass = torch.randperm(columns, generator=draw)[:floats].sort().values.int() if floats else None
        codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=draw)
        scale = torch.rand(rows, groups, generator=draw).half()
        zero = torch.randint(0, 2**bits, (rows, groups), dtype=torch.uint8, generator=draw)
        self.weight = linear_w_a8.tile(pack(codes, bits), scale, zero, group, columns)
        reach = 1 if self.spec.symmetric else -(-columns // self.spec.columns_per_group(columns))
        sums = None if self.spec.symmetric else torch.randn(rows, reach, generator=draw).numpy()
        beside = torch.randn(rows, floats, generator=draw).half().numpy() if floats else None
        self.side = tile_side(sums, beside)
        self.layer = IntegerLinear(self.weight, self.spec, self.side, {}, self.bypass)

    def check(self, x: torch.Tensor) -> None:
        wanted = reference.linear(self.weight, self.spec, self.side, {}, self.bypass, x)
        found = self.layer(x)
        assert found.dtype == x.dtype
        assert torch.equal(found.nan_to_num(-7.5), wanted.nan_to_num(-7.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=["int8", "int4", "int6-groups"])
def test_it_is_the_three_kernels(isa: str, scheme: dict[str, object], dtype: torch.dtype) -> None:
    shapes = [(1, 64), (35, 130), (515, 96)]
    for bits, (rows, columns), group, floats in itertools.product((2, 4, 8), shapes, (32, 64), (0, 3)):
        case = Case(bits, rows, columns, group, scheme, floats)
        for tokens in (0, 1, 5, 16, 257, 300):
            case.check(torch.randn(tokens, columns).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads_and_rows_that_are_not_contiguous(isa: str, dtype: torch.dtype) -> None:
    case = Case(8, 300, 576, 576, SCHEMES[0])
    x = torch.randn(576, 70).to(dtype).T
    alone = torch.cat([case.layer(x[t : t + 1]) for t in range(70)])
    for threads in (1, 2, 5):
        set_threads(threads)
        assert torch.equal(case.layer(x), alone)


def test_bfloat16_rounds_to_even_and_keeps_what_is_not_a_number(isa: str) -> None:
    case = Case(8, 20, 64, 64, SCHEMES[0])
    x = torch.randn(9, 64) * torch.logspace(-30, 30, 9)[:, None]
    x[3, 5], x[4, 6] = torch.nan, torch.inf
    case.check(x.bfloat16())
    assert case.layer(x.bfloat16())[3:5].isnan().all()


def test_shapes_and_dtypes_are_checked() -> None:
    case = Case(4, 20, 64, 32, SCHEMES[1])
    with pytest.raises(FormatError, match=r"float32 or bfloat16 \[tokens, 64\], got float16 \[2, 64\]"):
        case.layer(torch.zeros(2, 64).half())
    with pytest.raises(FormatError, match=r"\[tokens, 64\], got float32 \[2, 63\]"):
        case.layer(torch.zeros(2, 63))
    with pytest.raises(FormatError, match="1 numbers beside a row's codes, and 0 to multiply them with"):
        IntegerLinear(case.weight, case.spec)
