"""The analytical half of the FP8 study: its printed table, and closed forms against Monte Carlo and slow loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from anybit.evaluate.sqnr.densities import Density, Gaussian, StudentT, Uniform, t_below
from anybit.evaluate.sqnr.expected import (
    DENSITIES,
    FORMATS,
    chosen,
    crossing,
    dot_error,
    expected_error,
    flexible,
    nearest,
    study_grid,
    table,
)
from anybit.formats.floating import FloatType

PRINTED = {  # dB at the best range, in the order of FORMATS
    "uniform": (26.28, 32.41, 38.49, 44.49, 48.13),
    "gaussian": (25.58, 31.56, 37.56, 42.67, 40.57),
    "student-t 8": (25.56, 31.54, 37.52, 38.43, 34.41),
    "student-t 3": (25.56, 31.54, 33.06, 21.95, 19.03),
    "gaussian + 0.1 % at 20..60": (26.04, 32.08, 37.91, 27.82, 22.18),
}


def test_the_printed_table_is_reproduced() -> None:
    found = table()
    for title, row in PRINTED.items():
        for name, printed in zip(FORMATS, row, strict=True):
            assert found[title][name][0] == pytest.approx(printed, abs=0.05), (title, name)
    assert found["gaussian"]["E2M5"][1] == pytest.approx(4.33, rel=0.02)
    assert found["gaussian"]["INT8"][1] == pytest.approx(3.90, rel=0.02)


def test_the_format_to_choose_follows_the_tail() -> None:
    assert chosen(Uniform()) == "INT8"
    assert chosen(Gaussian()) == "E2M5"
    assert chosen(DENSITIES["student-t 3"]) == "E3M4"
    assert chosen(DENSITIES["gaussian + 0.1 % at 20..60"]) == "E3M4"
    assert chosen(StudentT(3, 30_000.0, cut=True)) == "E4M3"
    assert crossing() == pytest.approx(11.7, abs=0.05)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "density", [Uniform(), Gaussian(), StudentT(8, 100.0), StudentT(5, 4.0), DENSITIES["gaussian + 0.1 % at 20..60"]]
)
def test_expected_errors_are_those_of_two_million_numbers(name: str, density: Density) -> None:
    grid = study_grid(name, density.bound * 0.4)
    x = density.sample(2_000_000, np.random.default_rng(1))
    off = nearest(grid, x) - x
    found = expected_error(grid, density)
    assert found.power == pytest.approx(float((x * x).mean()), rel=0.03)
    noise = float((off * off).std()) / len(x) ** 0.5
    assert abs(found.square - float((off * off).mean())) <= 0.01 * found.square + 4 * noise
    assert abs(found.product - float((x * off).mean())) <= 4 * float((x * off).std()) / len(x) ** 0.5 + 1e-9


def test_dot_products_count_the_correlation_of_error_and_signal() -> None:
    density, draw = Gaussian(), np.random.default_rng(2)
    for c in (4.0, 1.2):  # hard clipping makes errors correlate with what is rounded
        grid = study_grid("INT8", c)
        x, y = density.sample(2_000_000, draw), density.sample(2_000_000, draw)
        measured = float(((nearest(grid, x) * nearest(grid, y) - x * y) ** 2).mean())
        error = expected_error(grid, density)
        assert dot_error(error, error) == pytest.approx(measured, rel=0.015)


def test_student_t_below_integrates_its_density() -> None:
    for freedom in (1, 2, 3, 6, 8, 9):
        x = np.linspace(-40, 40, 400_001)
        density = (1 + x * x / freedom) ** (-(freedom + 1) / 2)
        steps = np.diff(t_below(x, freedom))
        middle = (density[1:] + density[:-1]) / 2
        assert np.allclose(steps / steps.max(), middle / middle.max(), rtol=1e-4, atol=1e-9)
        assert t_below(np.array([0.0]), freedom)[0] == pytest.approx(0.5)
        assert t_below(np.array([1e9]), freedom)[0] == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["E5M2", "E4M3", "E3M4", "E2M5"])
def test_the_real_bias_is_a_scale(name: str) -> None:
    exponent, mantissa = int(name[1]), int(name[3])
    draw = np.random.default_rng(3)
    for largest in (1.0, 0.37, 448.0, 2.0 ** (2**exponent - 1) * (2 - 2.0**-mantissa)):
        grid = study_grid(name, largest)
        assert len(np.unique(np.abs(grid))) == 128
        x = draw.standard_normal(20_000) * largest * 10.0 ** draw.uniform(-4, 0.3, 20_000)
        found = flexible(x, exponent, mantissa, largest)
        best = np.abs(grid[None, :] - x[:500, None]).min(1)
        assert np.allclose(np.abs(found[:500] - x[:500]), best, rtol=1e-9, atol=1e-12 * largest)
        assert np.allclose(nearest(grid, found), found, rtol=1e-12)


def test_one_exponent_bit_is_int8() -> None:
    int8 = np.arange(128) / 127
    codes = FloatType(1, 6).magnitudes.double().numpy()
    assert np.allclose(codes / codes[-1], int8, atol=0, rtol=1e-12)
    x = np.random.default_rng(4).uniform(-1.2, 1.2, 1000)
    assert np.allclose(flexible(x, 1, 6, 1.0), np.rint(x.clip(-1, 1) * 127) / 127, atol=1e-12)


def test_gaussian_rows_scaled_to_their_largest_number() -> None:
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(200, 4096, generator=draw, dtype=torch.float64)
    reach = x.abs().amax(1, keepdim=True)
    integers = (x / reach * 127).round() / 127 * reach
    numbers = FloatType.parse("e4m3")
    floats = numbers.value(numbers.round((x / reach * 448).float())).double() / 448 * reach
    for read, printed in ((integers, 41.24), (floats, 31.55)):
        assert float(10 * torch.log10(x.square().sum() / (read - x).square().sum())) == pytest.approx(printed, abs=0.15)
