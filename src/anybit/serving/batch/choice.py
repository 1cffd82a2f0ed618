"""How a request chooses its tokens from logits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from anybit.engine.sampler import Sampler
from anybit.serving.batch.request import Request, TokenLogprobs

Floats = NDArray[np.float32]


class Choice:
    """`engine.steps.Choose` with penalties and log-probabilities.

    Attributes:
        greedy: whether the likeliest token is all that is wanted, so that logits need not leave the model.
        logprobs: of each token chosen so far, where asked for.
    """

    def __init__(self, request: Request) -> None:
        self._request, self._sampler = request, Sampler(request.temperature, request.seed, request.top_p)
        self.greedy = self._sampler.greedy and request.plain and request.logprobs is None
        self.logprobs: list[TokenLogprobs] = []
        self._said: list[int] = []

    def __call__(self, logits: Floats, position: int) -> int:
        """The token at `position` of the new text, from logits [vocabulary]; those before it were chosen here, too."""
        token = self._sampler(logits if self._request.plain else self._adjusted(logits, position), position)
        self._said[position:] = [token]
        if self._request.logprobs is not None:
            self.logprobs[position:] = [logprobs(logits, token, self._request.logprobs)]
        return token

    def _adjusted(self, logits: Floats, position: int) -> Floats:
        asked, changed = self._request, logits.copy()
        if asked.logit_bias:
            changed[list(asked.logit_bias)] += np.array(list(asked.logit_bias.values()), np.float32)
        tokens, counts = np.unique(np.array(self._said[:position], np.int64), return_counts=True)
        changed[tokens] -= (asked.presence_penalty + asked.frequency_penalty * counts).astype(np.float32)
        return changed


def logprobs(logits: Floats, token: int, count: int) -> TokenLogprobs:
    """Natural log-probability of `token` and the `count` likeliest under softmax(logits [vocabulary]); equals in order of ids."""
    shifted = logits.astype(np.float64) - float(logits.max())
    total = float(np.log(np.exp(shifted).sum()))
    best = np.argpartition(-logits, count)[:count] if count else np.empty(0, np.int64)
    best = best[np.lexsort((best, -logits[best]))]
    return TokenLogprobs(float(shifted[token]) - total, tuple((int(i), float(shifted[i]) - total) for i in best))
