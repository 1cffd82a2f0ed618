"""Activations by every integer scheme: native codes, scales, sums and sides equal the definition bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from anybit.errors import FormatError
from anybit.formats.activation import IntActivations
from anybit.kernels.native import set_threads
from anybit.kernels.quantize_activations.encode import Encoded, encode

COLUMNS = (1, 31, 33, 64, 130, 576, 1031)
TOKEN = [
    {"symmetric": True},
    {"symmetric": True, "clip": 0.7},
    {"symmetric": False},
    {"symmetric": False, "clip": 0.9},
    {"symmetric": False, "rounded_zero": True},
]
FORMS = TOKEN + [{**form, "granularity": "group", "group_size": 64} for form in TOKEN]


def hard_rows(columns: int, seed: int = 0) -> Tensor:
    """Rows of very different size, one sign, constants, zeros, ties, tiny and huge numbers."""
    draw = torch.Generator().manual_seed(seed + columns)
    x = torch.randn(12, columns, generator=draw) * torch.logspace(-6, 6, 12)[:, None]
    x[:, ::7] *= 50
    x[0] = torch.randint(-127, 127, (columns,), generator=draw) + 0.5
    x[0, :: min(columns, 32)] = 127
    x[1], x[2], x[3] = x[1].abs() + 3, -x[2].abs() - 1e-3, 4.25
    x[4], x[5] = 0, 1e-38
    x[6, columns // 2] = 3e38
    x[6, 0] = -3e38
    return x


def same(first: Encoded, second: Encoded) -> None:
    for name in ("codes", "scale", "sums", "side"):
        a, b = getattr(first, name), getattr(second, name)
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert torch.equal(a.nan_to_num(-7.5), b.nan_to_num(-7.5)), name


def check(x: Tensor, spec: IntActivations, size: int, tensors: dict[str, Tensor], bypass: Tensor | None) -> Encoded:
    found = encode(x, spec, size, tensors, bypass, impl="native")
    same(found, encode(x, spec, size, tensors, bypass, impl="reference"))
    return found


@pytest.mark.parametrize("columns", COLUMNS)
def test_every_scheme_equals_the_definition(isa: str, columns: int) -> None:
    x = hard_rows(columns)
    for form, bits, size in itertools.product(FORMS, (2, 3, 4, 8), (32, 64, columns)):
        spec = IntActivations(bits=bits, **form)
        if size > 64 and spec.columns_per_group(columns) < columns:
            continue
        found = check(x, spec, size, {}, None)
        exact = [part.long().sum(1) for part in found.codes[:, :columns].split(min(size, columns), 1)]
        assert torch.equal(found.sums, torch.stack(exact, 1).float())
        assert not found.codes[:, columns:].any()


def test_columns_that_bypass(isa: str) -> None:
    for columns, form in itertools.product((33, 130, 576), FORMS):
        spec, x = IntActivations(bits=4, **form), hard_rows(columns)
        for index in (torch.tensor([0]), torch.arange(0, columns, 5), torch.arange(columns), torch.arange(32, columns)):
            found = check(x, spec, 32, {}, index)
            assert not found.codes[:, index].any()
            x[:, index[-1]] = torch.nan  # neither code nor scale may see it
            after = encode(x, spec, 32, {}, index, impl="native")
            assert torch.equal(found.codes, after.codes)
            assert torch.equal(found.scale.nan_to_num(7), after.scale.nan_to_num(7))
            x = hard_rows(columns)


def test_static_scales(isa: str) -> None:
    x = hard_rows(130)
    x[7, 3], x[8, 100], x[9, 129] = torch.nan, torch.inf, -torch.inf
    for symmetric, granularity in itertools.product((True, False), ("tensor", "group")):
        spec = IntActivations(bits=5, symmetric=symmetric, granularity=granularity, group_size=64, static=True)
        count = 1 if granularity == "tensor" else 3
        tensors = {"input_scale": torch.linspace(0.01, 2, count), "input_offset": torch.linspace(-1, 1, count)}
        found = check(x, spec, 32, tensors, torch.tensor([5, 64]))
        assert bool(found.scale[7:10].isnan().any(1).all())
        assert bool(found.scale[:7].isfinite().all())


def test_groups_with_nan_or_infinity_stand_for_nan(isa: str) -> None:
    x = hard_rows(130)
    x[3, 70], x[8, 129], x[9, 0] = torch.nan, torch.inf, -torch.inf
    for form in FORMS:
        found = check(x, IntActivations(bits=6, **form), 32, {}, None)
        assert bool(found.scale[[3, 8, 9]].isnan().any(1).all())


def test_a_row_alone_and_any_number_of_threads(isa: str) -> None:
    x, index = hard_rows(576).repeat(30, 1), torch.tensor([1, 40, 575])
    spec = IntActivations(bits=4, symmetric=False)
    alone = [encode(row[None], spec, 64, None, index) for row in x[:40]]
    for threads in (1, 2, 5):
        set_threads(threads)
        together = encode(x, spec, 64, None, index)
        for name in ("codes", "scale", "sums", "side"):
            whole = getattr(together, name)[:40]
            assert torch.equal(whole.nan_to_num(7), torch.cat([getattr(one, name) for one in alone]).nan_to_num(7))


def test_groups_that_do_not_nest_are_refused() -> None:
    with pytest.raises(FormatError, match="not whole groups of 64"):
        encode(torch.zeros(1, 256), IntActivations(granularity="group", group_size=96), 64)
    with pytest.raises(FormatError, match="must be float32"):
        encode(torch.zeros(1, 256).half(), IntActivations(), 256)
