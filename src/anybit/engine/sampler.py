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

    def __init__(self, temperature: float, seed: int, top_p: float = 1.0) -> None:
        """Temperature 0 is greedy; else softmax(logits / temperature) is sampled with `seed` >= 0, among the likeliest tokens
        that together have the probability `top_p`."""
        self.greedy = temperature == 0
        self._temperature, self._seed, self._top_p = temperature, seed, top_p

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
        weights = logits.astype(np.float64)  # worked on in place: new memory for each step would take most of the time
        weights -= weights[best]
        weights /= self._temperature
        np.exp(weights, out=weights)
        if self._top_p < 1:
            weights *= nucleus(weights, self._top_p)
        below = np.cumsum(weights, out=weights)
        drawn = uniform(self._seed, position) * below[-1]
        return int(min(np.searchsorted(below, drawn, side="right"), len(below) - 1))


def nucleus(weights: NDArray[np.float64], share: float) -> NDArray[np.bool_]:
    """Which of the weights [n] are the fewest, largest ones that make up at least `share` of all; of equals the first."""
    total = weights.sum()
    # all that are smaller than this make up less than 1 - share together, so none is needed; few of a model's are left to sort
    large = np.flatnonzero(weights >= (1 - share) * total / len(weights))
    order = large[np.argsort(-weights[large], kind="stable")]
    kept = np.zeros(len(weights), bool)
    kept[order[: 1 + int(np.searchsorted(np.cumsum(weights[order]), share * total))]] = True
    return kept


def uniform(seed: int, position: int) -> float:
    """A draw from [0, 1) with 53 bits, a pure function of both."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def require_finite(largest: float) -> None:
    """Refuse logits whose maximum is NaN or infinite."""
    if not np.isfinite(largest):
        raise PromiseError("the model gives NaN or infinite logits; inspect its scales and norms")
