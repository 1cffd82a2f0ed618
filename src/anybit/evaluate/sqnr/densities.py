"""Densities with closed-form partial moments: everything the expected error of a quantizer needs.

`moments(x)` gives the integrals of 1, t and t^2 times the density from minus infinity to x, float64 [3, ...]; a density clipped
to +-bound keeps the clipped mass as points at its ends, unless it is `cut`: then nothing lies there. All are symmetric about 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Density(Protocol):
    """The contract."""

    @property
    def bound(self) -> float:
        """The largest |t| with mass."""
        ...

    @property
    def cut(self) -> bool:
        """Whether what the density has beyond +-bound is left out, not clipped to +-bound."""
        ...

    def moments(self, x: Array) -> Array:
        """Integrals of 1, t, t^2 times the unclipped density up to x [...]: [3, ...]."""
        ...

    def sample(self, count: int, draw: np.random.Generator) -> Array:
        """`count` clipped numbers, for Monte Carlo."""
        ...


@dataclass(frozen=True)
class Uniform:
    """On low..high and, mirrored, on -high..-low (low 0: the one interval +-high)."""

    high: float = 1.0
    low: float = 0.0
    cut: bool = False

    @property
    def bound(self) -> float:
        """`high`."""
        return self.high

    def moments(self, x: Array) -> Array:
        """Powers of x, on either side."""
        height = 0.5 / (self.high - self.low)
        left, right = np.clip(x, -self.high, -self.low), np.clip(x, self.low, self.high)
        parts = [
            (left ** (n + 1) - (-self.high) ** (n + 1) + right ** (n + 1) - self.low ** (n + 1)) / (n + 1)
            for n in range(3)
        ]
        return height * np.stack(parts)

    def sample(self, count: int, draw: np.random.Generator) -> Array:
        """See `Density`."""
        return draw.uniform(self.low, self.high, count) * draw.choice([-1.0, 1.0], count)


@dataclass(frozen=True)
class Gaussian:
    """N(0, 1)."""

    bound: float = 10.0
    cut: bool = False

    def moments(self, x: Array) -> Array:
        """The error function and the density itself."""
        below = 0.5 * _erfc(-x / math.sqrt(2))
        height = np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return np.stack([below, -height, below - x * height])

    def sample(self, count: int, draw: np.random.Generator) -> Array:
        """See `Density`."""
        return draw.standard_normal(count).clip(-self.bound, self.bound)


@dataclass(frozen=True)
class StudentT:
    """Student's t with `freedom` >= 3 degrees, an integer."""

    freedom: int = 8
    bound: float = 100.0
    cut: bool = False

    def moments(self, x: Array) -> Array:
        """t^2 f_v is v (v-1) / (v-2) of the t with two degrees fewer less v f_v, as integration by parts shows."""
        v = self.freedom
        constant = math.exp(math.lgamma((v + 1) / 2) - math.lgamma(v / 2)) / math.sqrt(v * math.pi)
        height = constant * (1 + x * x / v) ** (-(v + 1) / 2)
        below, fewer = t_below(x, v), t_below(x * math.sqrt((v - 2) / v), v - 2)
        return np.stack([below, -height * (v + x * x) / (v - 1), v * (v - 1) / (v - 2) * fewer - v * below])

    def sample(self, count: int, draw: np.random.Generator) -> Array:
        """See `Density`."""
        found = draw.standard_t(self.freedom, count)
        while self.cut and (outside := np.abs(found) > self.bound).any():
            found[outside] = draw.standard_t(self.freedom, int(outside.sum()))
        return found.clip(-self.bound, self.bound)


@dataclass(frozen=True)
class Mixture:
    """`rest` with probability `share`, else `main`."""

    main: Density
    rest: Density
    share: float
    cut: bool = False

    @property
    def bound(self) -> float:
        """Of the wider one; neither is clipped to less."""
        return max(self.main.bound, self.rest.bound)

    def moments(self, x: Array) -> Array:
        """Weighted sum."""
        return (1 - self.share) * self.main.moments(x) + self.share * self.rest.moments(x)

    def sample(self, count: int, draw: np.random.Generator) -> Array:
        """See `Density`."""
        rare = draw.random(count) < self.share
        return np.where(rare, self.rest.sample(count, draw), self.main.sample(count, draw))


def t_below(x: Array, freedom: int) -> Array:
    """P(t <= x) for an integer number of degrees of freedom >= 1: the finite trigonometric sums."""
    angle = np.arctan(x / math.sqrt(freedom))
    sine, cosine2 = np.sin(angle), np.cos(angle) ** 2
    term = np.ones_like(x) if freedom % 2 == 0 else np.sqrt(cosine2)
    total = np.zeros_like(x)
    for k in range(freedom // 2):
        total += term
        term = term * cosine2 * ((2 * k + 1) / (2 * k + 2) if freedom % 2 == 0 else (2 * k + 2) / (2 * k + 3))
    if freedom % 2 == 0:
        return 0.5 + 0.5 * sine * total
    return 0.5 + (angle + sine * total) / math.pi


_erfc = np.vectorize(math.erfc, otypes=[np.float64])
