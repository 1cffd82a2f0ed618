"""Expected error of rounding a density to a grid, in closed form, and the range that makes it least.

Every cell of the grid adds the integral of (t - v)^2 p(t); what lies beyond the outermost numbers saturates to them. All
logarithms are 10 log10(signal power / error power), in dB.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from anybit.evaluate.sqnr.densities import Array, Density, Gaussian, Mixture, StudentT, Uniform

FORMATS = ("E5M2", "E4M3", "E3M4", "E2M5", "INT8")
DENSITIES: dict[str, Density] = {
    "uniform": Uniform(),
    "gaussian": Gaussian(),
    "student-t 8": StudentT(8, 100.0),
    "student-t 3": StudentT(3, 300.0, cut=True),
    "gaussian + 0.1 % at 20..60": Mixture(Gaussian(), Uniform(60.0, 20.0), 0.001),
}
PHASES = 96


@dataclass(frozen=True)
class Error:
    """Of a quantizer Q on a density: `square` = E (Q(t) - t)^2, `product` = E t (Q(t) - t), `power` = E t^2."""

    square: float
    product: float
    power: float

    @property
    def sqnr(self) -> float:
        """dB."""
        return 10 * math.log10(self.power / self.square)


def study_grid(name: str, largest: float = 1.0) -> Array:
    """The study's grid of an 8-bit format, scaled so that its largest number is `largest`: float64 [255], ascending.

    ExMy with x + y = 7 uses all codes for numbers (127 magnitudes, 0, and signs); INT8 is +-127.
    """
    if name == "INT8":
        positive = np.arange(1, 128) / 127.0
    else:
        exponent, mantissa = int(name[1]), int(name[3])
        codes = np.arange(1, 128)
        field, rest = codes >> mantissa, codes & ((1 << mantissa) - 1)
        fraction = rest / 2**mantissa
        positive = np.where(field > 0, (1 + fraction) * 2.0 ** (field - 1), fraction)
        positive = positive / positive[-1]
        assert exponent + mantissa == 7
    return np.concatenate([-positive[::-1], [0.0], positive]) * largest


def flexible(values: Array, exponent: int, mantissa: int, largest: float) -> Array:
    """The study's quantizer (arXiv 2208.09225): rounding to an integer grid whose step follows the number, with a real bias such
    that `largest` is exactly the largest number. Ties to even in units of the step."""
    bias = 2.0**exponent - math.log2(largest) + math.log2(2 - 2.0**-mantissa) - 1
    inside = np.clip(values, -largest, largest)
    # frexp of |x| 2^bias is exact near powers of two where floor(log2) is not
    power = np.frexp(np.abs(inside) * 2.0 ** (bias - math.floor(bias)))[1] - 1 + math.floor(bias)
    step = 2.0 ** (np.maximum(1, power) - mantissa - bias)
    return np.asarray(np.rint(inside / step) * step)


def expected_error(grid: Array, density: Density) -> Error:
    """Of rounding to the nearest number of `grid` float64 [L], ascending."""
    edges = np.concatenate(
        [[-density.bound], ((grid[1:] + grid[:-1]) / 2).clip(-density.bound, density.bound), [density.bound]]
    )
    below = density.moments(edges)
    mass, first, second = below[:, 1:] - below[:, :-1]
    inside = float(mass.sum())
    if density.cut:
        mass, first, second = mass / inside, first / inside, second / inside
    tail = 0.0 if density.cut else 1 - inside  # points at either end
    ends = np.array([-density.bound, density.bound])
    lost = nearest(grid, ends) - ends
    square = float((second - 2 * grid * first + grid**2 * mass).sum() + tail / 2 * (lost**2).sum())
    product = float((grid * first - second).sum() + tail / 2 * (ends * lost).sum())
    return Error(square, product, float(second.sum()) + tail * density.bound**2)


def nearest(grid: Array, values: Array) -> Array:
    """The number of `grid`, ascending, nearest to each value."""
    return np.asarray(grid[np.searchsorted((grid[1:] + grid[:-1]) / 2, values)])


def dot_error(x: Error, y: Error) -> float:
    """Expected squared error of a product of independent, separately rounded x and y: what one term of a dot product adds."""
    own = x.square * y.power + y.square * x.power + x.square * y.square
    return own + 2 * x.product * y.product + 2 * x.square * y.product + 2 * y.square * x.product


def best_range(name: str, density: Density) -> tuple[float, Error]:
    """The largest number c for which format `name` has the least error, and that error.

    Errors are a sawtooth in log2 c with a period of one octave for floats: a fine geometric search over every octave.
    """
    top = density.bound * 1.25
    candidates = top * 2.0 ** (-np.arange(0, 10 * PHASES) / PHASES)
    errors = [expected_error(study_grid(name, float(c)), density) for c in candidates]
    least = min(range(len(errors)), key=lambda i: errors[i].square)
    return float(candidates[least]), errors[least]


def table() -> dict[str, dict[str, tuple[float, float]]]:
    """By density and format: (SQNR in dB at the best range, that range)."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for title, density in DENSITIES.items():
        best = {name: best_range(name, density) for name in FORMATS}
        found[title] = {name: (error.sqnr, c) for name, (c, error) in best.items()}
    return found


def chosen(density: Density) -> str:
    """The format with the least error at its best range."""
    return min(FORMATS, key=lambda name: best_range(name, density)[1].square)


def crossing(floor: float = 31.5) -> float:
    """The crest factor (largest over root mean square) above which a float format with a flat SQNR of `floor` dB beats INT8
    scaled to the largest number: 20 log10(127 sqrt(12) / crest) = floor."""
    return 127 * math.sqrt(12) / 10 ** (floor / 20)
