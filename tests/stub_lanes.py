"""Lanes whose texts are written by hand, and lanes of a tiny model with other weights at each precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from anybit.engine.lanes import TorchLanes
from tiny_models import tiny

END = 0
VOCAB = 16


class ScriptedLanes:
    """`script(tokens so far, precisions of the steps so far, bits)` is the next token; the first precision is the prompt's.

    Counts passes, so that a test can see what was run.
    """

    def __init__(self, script: Callable[[list[int], list[int]], int], precisions=(2, 3, 4), count=4) -> None:
        self.script, self.precisions, self.count = script, tuple(precisions), count
        self.context, self.end_ids = None, frozenset([END])
        self.tokens: dict[int, list[int]] = {}
        self.widths: dict[int, list[int]] = {}  # one for each token held
        self.passes: list[int] = []

    def read(self, lane: int, ids: Sequence[int], bits: int):
        self.tokens[lane], self.widths[lane] = list(ids), [bits] * len(ids)
        return self._logits(lane)

    def step(self, tokens: Mapping[int, int], bits: int):
        self.passes.append(bits)
        for lane, token in tokens.items():
            self.tokens[lane].append(token)
            self.widths[lane].append(bits)
        return np.stack([self._logits(lane) for lane in tokens])

    def extend(self, lane: int, ids: Sequence[int], bits: int):
        return np.concatenate([self.step({lane: token}, bits) for token in ids])

    def length(self, lane: int) -> int:
        return len(self.tokens[lane])

    def keep(self, lane: int, length: int) -> None:
        del self.tokens[lane][length:], self.widths[lane][length:]

    def last_keys_values(self, lane: int):
        tokens = np.asarray(self.tokens[lane], np.float32)
        keys = np.stack([np.stack([tokens, tokens + 1], axis=1)] * 2)  # two heads of width two
        return keys, -keys

    def _logits(self, lane: int):
        logits = np.zeros(VOCAB, np.float32)
        logits[self.script(self.tokens[lane], self.widths[lane])] = 5
        return logits


class Widths:
    """A precision cell that swaps a model's weights for those of another width."""

    def __init__(self, model, weights: dict[int, dict]) -> None:
        self._model, self._weights, self._bits = model, weights, max(weights)
        self.available = sorted(weights)

    @property
    def bits(self) -> int:
        return self._bits

    @bits.setter
    def bits(self, bits: int) -> None:
        if bits != self._bits:
            self._model.load_state_dict(self._weights[bits])
        self._bits = bits


def tiny_lanes(seed: int = 0, count: int = 4) -> TorchLanes:
    """A tiny llama whose 4-, 3- and 2-bit selves are it plus growing noise."""
    model = tiny("llama", seed)
    exact = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    draw = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(tensor.shape, generator=draw) * tensor.std() for name, tensor in exact.items()}
    weights = {
        bits: {n: t + noise[n] * share for n, t in exact.items()} for bits, share in ((4, 0.0), (3, 0.1), (2, 0.4))
    }
    return TorchLanes(model, Widths(model, weights), frozenset([2]), count)
