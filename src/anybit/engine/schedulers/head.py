"""The network of the learned scheduler (methods/pmpd.md 2.4), in plain numpy: it runs once per text.

Learnable queries attend to the last layer's keys; what they read of the values goes through a small classifier. Its classes
say after how many thirds of the text's length the precision falls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from anybit.errors import FormatError

Array = NDArray[np.float32]
NAMES = ("queries", "norm.weight", "norm.bias", "hidden.weight", "hidden.bias", "out.weight", "out.bias")
NORM_EPSILON = 1e-5


@dataclass(frozen=True)
class Head:
    """One classifier, of one pair of neighbouring precisions; H kv heads of width D, C classes.

    Attributes:
        tensors: float32: `queries` [H, H, D], `norm.*` [D * H], `hidden.weight` [D * H, D * H], `hidden.bias`,
            `out.weight` [C, D * H], `out.bias` [C].
    """

    tensors: Mapping[str, Array]

    def logits(self, keys: Array, values: Array) -> Array:
        """Scores [C] from the averages over heads of keys and values, each [T, D]."""
        read = pooled(self.tensors["queries"], keys, values)
        return mlp(self.tensors, layer_norm(read, self.tensors["norm.weight"], self.tensors["norm.bias"]))

    @classmethod
    def restore(cls, tensors: Mapping[str, Array]) -> Self:
        """From saved tensors.

        Raises:
            FormatError: tensors missing, or of shapes that do not fit each other.
        """
        if missing := [name for name in NAMES if name not in tensors]:
            raise FormatError(f"a schedule's head has no {', '.join(missing)}; train it again")
        shape = tensors["queries"].shape
        width = shape[-1] * shape[0]
        expected = {"norm.weight": (width,), "norm.bias": (width,), "hidden.weight": (width, width)}
        wrong = [name for name, want in expected.items() if tensors[name].shape != want]
        if len(shape) != 3 or shape[0] != shape[1] or tensors["out.weight"].shape[1:] != (width,) or wrong:
            raise FormatError("the tensors of a schedule's head do not fit each other; train it again")
        return cls({name: np.asarray(tensors[name], np.float32) for name in NAMES})


def mean_heads(features: Any) -> tuple[Array, Array]:
    """Keys and values of the last layer, float32 [H, T, D] each, averaged over heads: [T, D] each."""
    keys, values = features.last_keys_values()
    return np.asarray(keys, np.float32).mean(axis=0), np.asarray(values, np.float32).mean(axis=0)


def pooled(queries: Array, keys: Array, values: Array) -> Array:
    """What queries [H, H, D] read of values [T, D], averaged over the second axis, as a vector [D * H] (D first)."""
    scores = queries @ keys.T / np.sqrt(np.float32(keys.shape[1]))
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    read: Array = (weights @ values).mean(axis=1).T.reshape(-1)
    return read


def layer_norm(x: Array, weight: Array, bias: Array) -> Array:
    """Layer normalisation of a vector."""
    centred = x - x.mean()
    normal: Array = centred / np.sqrt((centred**2).mean() + np.float32(NORM_EPSILON)) * weight + bias
    return normal


def mlp(tensors: Mapping[str, Array], x: Array) -> Array:
    """Two linear layers with a ReLU between."""
    hidden = np.maximum(tensors["hidden.weight"] @ x + tensors["hidden.bias"], 0)
    out: Array = tensors["out.weight"] @ hidden + tensors["out.bias"]
    return out


def softmax(logits: Array) -> list[float]:
    """Probabilities."""
    weights = np.exp(logits - logits.max())
    return [float(weight) for weight in weights / weights.sum()]
