"""The sampler against exact probabilities, and its independence of history."""

import numpy as np
import pytest

from anybit.engine.sampler import Sampler, nucleus, uniform
from anybit.errors import PromiseError


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_softmax(temperature):
    """Chi-square over the joint distribution of three tokens of a model with four."""
    table = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)  # logits after each token
    weights = np.exp(table / temperature, dtype=np.float64)
    exact = weights / weights.sum(1, keepdims=True)
    joint = np.einsum("a,ab,bc->abc", exact[0], exact, exact).ravel()
    counts = np.zeros(64)
    for seed in range(6000):
        sampler, token, at = Sampler(temperature, seed), 0, 0
        for position in range(3):
            token = sampler(table[token], position)
            at = 4 * at + token
        counts[at] += 1
    rare = joint * 6000 < 5
    observed, expected = np.append(counts[~rare], counts[rare].sum()), np.append(joint[~rare], joint[rare].sum()) * 6000
    statistic = ((observed - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
    freedom = (expected > 0).sum() - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


def test_a_draw_is_a_function_of_seed_and_position():
    draws = {(seed, position): uniform(seed, position) for seed in (0, 1, 2**40) for position in range(200)}
    assert all(uniform(*key) == value for key, value in reversed(draws.items()))
    assert len(set(draws.values())) == len(draws)
    assert all(0 <= value < 1 for value in draws.values())


def test_edges():
    equal = np.array([1.0, 3.0, 3.0, 3.0], np.float32)
    assert Sampler(0.0, 0)(equal, 0) == 1
    assert {Sampler(1e-30, 0)(equal, position) for position in range(60)} == {1, 2, 3}
    only = np.array([-np.inf, 0.0, -np.inf], np.float32)
    assert {Sampler(5.0, 0)(only, position) for position in range(60)} == {1}
    for bad in (np.nan, np.inf):
        for temperature in (0.0, 1.0):
            with pytest.raises(PromiseError, match="NaN"):
                Sampler(temperature, 0)(np.array([1.0, bad, 0.0], np.float32), 0)


@pytest.mark.parametrize("share", [1e-9, 0.3, 0.9, 0.999999, 1 - 2**-53])
@pytest.mark.parametrize("kind", ["flat", "peaked", "equal", "one"])
def test_the_nucleus_is_what_sorting_everything_gives(kind, share):
    draw = np.random.default_rng(3)
    weights = {"flat": draw.random(3000), "peaked": np.exp(-20 * draw.random(3000)), "equal": np.ones(3000),
               "one": np.eye(1, 3000, 7)[0]}[kind]  # fmt: skip
    order = np.argsort(-weights, kind="stable")
    expected = order[: 1 + int(np.searchsorted(np.cumsum(weights[order]), share * weights.sum()))]
    found = np.flatnonzero(nucleus(weights, share))
    assert set(found) == set(expected)
