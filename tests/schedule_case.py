"""What schedulers look at, and heads of random numbers."""

from __future__ import annotations

import numpy as np

from anybit.engine.schedulers.head import Head


class Prompt:
    """Features of two kv heads."""

    def __init__(self, seed: int, tokens: int = 7, width: int = 4) -> None:
        self.pair = np.random.default_rng(seed).normal(size=(2, 2, tokens, width)).astype(np.float32)

    def last_keys_values(self):
        return self.pair[0], self.pair[1]


def head(seed: int, heads: int = 2, width: int = 4, classes: int = 4) -> Head:
    draw, size = np.random.default_rng(seed), heads * width
    shapes = {"queries": (heads, heads, width), "norm.weight": (size,), "norm.bias": (size,), "hidden.weight": (size, size),
              "hidden.bias": (size,), "out.weight": (classes, size), "out.bias": (classes,)}  # fmt: skip
    return Head.restore({name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()})
