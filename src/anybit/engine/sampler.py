"""Choosing a token from logits, the same one whatever happened before: greedy, or sampled with a counter-based generator.

The draw of a position depends on (seed, position) alone, so a text does not depend on how many tokens a pass checks at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from anybit.errors import PromiseError


class Sampler:
    """Chooses tokens of one text.

    Attributes:
        greedy: whether the likeliest token is always taken, the lowest id of equals.
    """

    def __init__(self, temperature: float, seed: int) -> None:
        """Temperature 0 is greedy; else softmax(logits / temperature) is sampled with `seed` >= 0."""
        self.greedy = temperature == 0
        self._temperature, self._seed = temperature, seed

    def __call__(self, logits: NDArray[Any], position: int) -> int:
        """The token at `position` = 0, 1, ... of the new text, from its logits [vocabulary].

        Raises:
            PromiseError: the largest logit is NaN or infinite.
        """
        best = int(logits.argmax())
        require_finite(float(logits[best]))  # the maximum of a row with a NaN is NaN
        if self.greedy:
            return best
        # softmax is unchanged by a shift; shifting first keeps tiny temperatures from overflowing to inf - inf
        weights = np.exp((logits.astype(np.float64) - float(logits[best])) / self._temperature)
        below = np.cumsum(weights)
        drawn = uniform(self._seed, position) * below[-1]
        return int(min(np.searchsorted(below, drawn, side="right"), len(below) - 1))


def uniform(seed: int, position: int) -> float:
    """A draw from [0, 1) with 53 bits, a pure function of both."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def require_finite(largest: float) -> None:
    """Refuse logits whose maximum is NaN or infinite."""
    if not np.isfinite(largest):
        raise PromiseError("the model gives NaN or infinite logits; inspect its scales and norms")
