"""Confidence in a difference between two systems that answered the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anybit.errors import InputError


@dataclass(frozen=True)
class Difference:
    """Mean of a - b over prompts, with its 95 % interval.

    Attributes:
        mean, low, high: of the difference.
        wins, losses: share of prompts where a is above, below.
        n: prompts.
    """

    mean: float
    low: float
    high: float
    wins: float
    losses: float
    n: int

    @property
    def significant(self) -> bool:
        """The interval does not hold 0."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(a: Sequence[float], b: Sequence[float], *, draws: int = 10_000, seed: int = 0) -> Difference:
    """Percentile bootstrap over prompts of the mean of a - b; deterministic in `seed`.

    Raises:
        InputError: different lengths, or no prompt.
    """
    if len(a) != len(b) or not len(a):
        raise InputError(f"paired numbers come in pairs: {len(a)} and {len(b)} of them")
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    n = len(difference)
    rng = np.random.default_rng(seed)
    # in blocks: all draws at once would be gigabytes for many prompts
    block = max(1, 2**22 // n)
    sizes = [min(block, draws - start) for start in range(0, draws, block)]
    means = np.concatenate([difference[rng.integers(0, n, (size, n))].mean(axis=1) for size in sizes])
    low, high = np.quantile(means, [0.025, 0.975])
    shares = float((difference > 0).mean()), float((difference < 0).mean())
    return Difference(float(difference.mean()), float(low), float(high), *shares, n)
