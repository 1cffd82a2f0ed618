"""Rounding to small floats: arithmetic against the codec, range search and votes against slow loops."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from anybit.formats.floating import FloatType
from anybit.formats.terms import dense, save_terms
from anybit.methods.base import InputStats
from anybit.methods.float_rtn import CANDIDATES, TYPES, FloatRTN, nearest

FLOATS = ("e4m3", "e5m2", "e3m4", "e2m5", "e1m6", "e2m3", "e2m1")


def weight(rows: int = 6, columns: int = 80) -> torch.Tensor:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.05
    w[0, 3], w[1] = 3.0, 0
    return w


@pytest.mark.parametrize("name", FLOATS)
def test_arithmetic_rounding_is_the_codec(name: str) -> None:
    numbers = FloatType.parse(name)
    finite = numbers.magnitudes[numbers.magnitudes.isfinite()]
    borders = (finite[1:] + finite[:-1]) / 2
    ulp = torch.tensor([-1e9, 0.0, 1e9])
    hard = torch.cat([finite, borders, *(torch.nextafter(borders, borders + side) for side in ulp if side)])
    draw = torch.Generator().manual_seed(1)
    usual = (
        torch.randn(200_000, generator=draw) * numbers.largest * 10.0 ** (torch.rand(200_000, generator=draw) * 6 - 5)
    )
    for x in (hard, -hard, usual):
        assert torch.equal(nearest(numbers, x), numbers.value(numbers.round(x)))


@pytest.mark.parametrize("type", [*TYPES, "e2m3"])
@pytest.mark.parametrize("granularity", ["row", "group", "tensor"])
@pytest.mark.parametrize("search", ["none", "mse"])
def test_values_are_the_nearest_of_the_grid_and_the_search_the_best_of_a_loop(
    type: str, granularity: str, search: str
) -> None:
    w = weight()
    method = FloatRTN(type=type, granularity=granularity, group_size=32, search=search)
    terms = method.quantize(w, InputStats())
    found = dense(terms)
    assert save_terms(terms, (6, 80))[0] == method.plan((6, 80))
    size = 32 if granularity == "group" else 80
    if type == "int8":
        grid = torch.arange(-127, 128) / 127
    else:
        numbers = FloatType.parse(type)
        positive = numbers.magnitudes[numbers.magnitudes.isfinite()] / min(numbers.largest, 448.0)
        grid = torch.cat([-positive, positive])
    whole = [w] if granularity == "tensor" else [part for row in w for part in row.split(size)]
    read = [found] if granularity == "tensor" else [part for row in found for part in row.split(size)]
    for values, decoded in zip(whole, read, strict=True):
        reach = float(values.abs().max()) or 1.0
        trials = [1.0] if search == "none" else CANDIDATES.tolist()
        losses = [(_round(values, grid * reach * c) - values).square().sum() for c in trials]
        least = float(min(losses))
        # float16 scales move the grid by 2^-11, or by more below 2^-14
        assert float((decoded - values).square().sum()) <= least * 1.05 + 1e-6
        assert float((decoded - values).square().sum()) >= least * 0.95 - 1e-6


def _round(values: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    return grid[(values[..., None] - grid).abs().argmin(-1)]


def test_rows_vote_by_their_tails() -> None:
    draw = torch.Generator().manual_seed(2)
    flat = torch.rand(70, 512, generator=draw) - 0.5
    assert FloatRTN(type="auto").decided(flat)[0].type == "int8"
    gaussian = torch.randn(70, 512, generator=draw)
    assert FloatRTN(type="auto").decided(gaussian)[0].type in ("e2m5", "int8")
    spiked = gaussian.clone()
    spiked[:, :3] *= 100
    method, note = FloatRTN(type="auto").decided(spiked)
    assert method.type in ("e3m4", "e4m3")
    assert method.type in note
    # every row but a few is Gaussian: the few do not decide
    mixed = gaussian.clone()
    mixed[:20] = spiked[:20]
    assert FloatRTN(type="auto").decided(mixed)[0].type in ("e2m5", "int8")


def test_small_channels_survive_by_rows_and_not_by_tensor() -> None:
    w = weight()
    w[2] *= 1e-5
    by_row, by_tensor = (dense(FloatRTN(granularity=g).quantize(w, InputStats())) for g in ("row", "tensor"))
    assert float((by_row[2] - w[2]).norm() / w[2].norm()) < 0.05
    assert float((by_tensor[2] - w[2]).norm() / w[2].norm()) > 0.2


def test_unknown_types_are_refused() -> None:
    with pytest.raises(ValidationError):
        FloatRTN(type="fp8")
