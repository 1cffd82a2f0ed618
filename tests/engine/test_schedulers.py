"""Schedulers: switch points, clocks, state of one request, decisions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from anybit.engine.schedule import BitsAccount, FixedSchedule
from anybit.engine.schedulers.activation import ActivationSchedule
from anybit.engine.schedulers.classes import switches_of
from anybit.engine.schedulers.confidence import ConfidenceSchedule
from anybit.engine.schedulers.head import Head, mean_heads
from anybit.engine.schedulers.learned import LearnedSchedule
from anybit.engine.schedulers.random import RandomSchedule
from anybit.engine.schedulers.static import candidates, chain_of, grid, mean_bits, static
from anybit.errors import FormatError, InputError
from schedule_case import Prompt, head


def trace(scheduler, state, steps: int) -> list[int]:
    return [scheduler.bits(state, step) for step in range(steps)]


def test_grid_and_points() -> None:
    assert grid(256) == (0, 85, 170, 256)
    assert grid(33) == (0, 11, 22, 33)
    assert static((4, 3), [85]).switches == ((0, 4), (85, 3))
    assert static((4, 3), [0]).switches == ((0, 3),)
    assert static((8, 4, 2), [5, 5]).switches == ((0, 8), (5, 2))
    with pytest.raises(InputError, match="do not fall"):
        static((4, 3, 2), [9, 5])
    with pytest.raises(InputError, match="needs 2 switch points"):
        static((4, 3, 2), [9])
    assert chain_of([2, 8, 4]) == (8, 4, 2)
    with pytest.raises(InputError, match="each one once"):
        chain_of([4, 4])


@pytest.mark.parametrize(("chain", "count"), [((4, 3), 4), ((8, 4, 2), 10), ((8, 6, 3, 2), 20), ((3,), 1)])
def test_candidates_are_all_monotone_paths_once(chain: tuple[int, ...], count: int) -> None:
    length, parts = 12, 3
    found = candidates(chain, length, parts)
    walks = {
        tuple(walk)
        for walk in itertools.product(chain, repeat=length)
        if length <= 12 and len(chain) < 3 and list(walk) == sorted(walk, reverse=True)
        and all(a == b or at % 4 == 0 for at, (a, b) in enumerate(itertools.pairwise(walk), start=1))
    }  # fmt: skip
    traces = [tuple(trace(s, s.start(None, length), length)) for s in found]  # type: ignore[arg-type]
    assert len(set(traces)) == len(found) == count
    if walks:
        assert set(traces) == walks
    for one in traces:
        assert list(one) == sorted(one, reverse=True)
    assert [mean_bits(s, length) for s in found] == sorted((np.mean(t) for t in traces), reverse=True)


@pytest.mark.parametrize("seed", range(6))
def test_every_schedule_only_falls(seed: int) -> None:
    chain, length = (8, 4, 2), 30
    schedulers = [LearnedSchedule(chain, (head(seed), head(seed + 99)), 8), RandomSchedule(chain, None, seed),
                  ConfidenceSchedule(chain, 3, 0.0)]  # fmt: skip
    draw = np.random.default_rng(seed)
    for scheduler in schedulers:
        state = scheduler.start(Prompt(seed), length)
        bits = []
        for step in range(length):
            bits.append(scheduler.bits(state, step))
            scheduler.observe(state, step, draw.normal(size=20) * 4)
        assert bits == sorted(bits, reverse=True)
        assert set(bits) <= set(chain)


def test_each_pair_counts_from_the_switch_before_it() -> None:
    # class 1 of 3 with L = 30 is ten steps: 8 bits for 10, then 4 bits for 10 more, not 0
    state = switches_of((8, 4, 2), [1, 1], 30, 3)
    assert state.switches == [(0, 8), (10, 4), (20, 2)]
    assert switches_of((8, 4, 2), [3, 0], 30, 3).switches == [(0, 8)]
    assert switches_of((8, 4, 2), [0, 3], 30, 3).switches == [(0, 4)]
    assert switches_of((8, 4, 2), [2, 2], 30, 3).switches == [(0, 8), (20, 4), (40, 2)]


def test_average_bits_as_the_paper_counts() -> None:
    """Its "0 high steps" still make one: one high decode step here. L = 12."""
    schedule = static((4, 2), [1])
    account = BitsAccount(tuple(trace(schedule, schedule.start(None, 12), 12)))  # type: ignore[arg-type]
    assert account.average_paper == 2
    assert account.average > 2
    never = static((4, 2), [12])
    assert BitsAccount(tuple(trace(never, never.start(None, 12), 12))).average == 4  # type: ignore[arg-type]


def test_confidence_by_hand() -> None:
    schedule = ConfidenceSchedule((4, 3), window=3, deviations=1.0)
    state = schedule.start(Prompt(0), 50)
    odds = [0.5, 0.6, 0.7, 0.65, 0.79, 0.81, 0.9]  # mean 0.6, deviation 0.1: the bar is 0.7; 0.79 is the first above it
    for step, p in enumerate(odds):
        schedule.observe(state, step, np.log([p, 1 - p]))
    assert state.switches == [(0, 4), (5, 3)]


def test_interleaved_requests_share_nothing() -> None:
    def run(order: list[int]) -> dict[int, list[list[int]]]:
        found: dict[int, list[list[int]]] = {0: [], 1: []}
        learned = LearnedSchedule((4, 3, 2), (head(1), head(2)), 4)
        for scheduler in (ConfidenceSchedule((4, 3, 2), 3, 0.0), learned, RandomSchedule((4, 3, 2))):
            states = {at: scheduler.start(Prompt(at), 24) for at in dict.fromkeys(order)}
            steps, bits = {0: 0, 1: 0}, {0: [], 1: []}
            draws = {at: np.random.default_rng(at) for at in states}
            for at in order:
                bits[at].append(scheduler.bits(states[at], steps[at]))
                scheduler.observe(states[at], steps[at], draws[at].normal(size=9) * 3)
                steps[at] += 1
            for at in states:
                found[at].append(bits[at])
        return found

    together, alone = run([0, 1, 1, 0] * 12), [run([at] * 24)[at] for at in (0, 1)]
    assert [together[0], together[1]] == alone


def test_random_follows_its_prior_and_nothing_else() -> None:
    prior = RandomSchedule((4, 3), ((0.5, 0.0, 0.5, 0.0),))
    classes = [prior.start(Prompt(at, 3), 30).data["classes"][0] for at in range(300)]
    assert set(classes) == {0, 2}
    assert 110 < classes.count(0) < 190
    again = [RandomSchedule((4, 3), prior.prior).start(Prompt(at, 3), 30).data["classes"][0] for at in range(300)]
    other = [RandomSchedule((4, 3), prior.prior, 1).start(Prompt(at, 3), 30).data["classes"][0] for at in range(300)]
    assert classes == again != other


def test_the_head_by_a_slow_sum() -> None:
    """Attention, transposition and the classifier written out in float64, entry by entry."""
    prompt, net = Prompt(5, 6, 4), head(3)
    keys, values = (part.astype(np.float64).mean(0) for part in prompt.last_keys_values())
    t = {name: tensor.astype(np.float64) for name, tensor in net.tensors.items()}
    read = np.zeros((2, 4))
    for i in range(2):
        for j in range(2):
            weights = np.exp([t["queries"][i, j] @ key / 2 for key in keys])
            read[i] += sum(w * v for w, v in zip(weights / weights.sum(), values, strict=True)) / 2
    x = np.array([read[i, d] for d in range(4) for i in range(2)])
    x = (x - x.mean()) / np.sqrt(x.var() + 1e-5) * t["norm.weight"] + t["norm.bias"]
    expected = t["out.weight"] @ np.maximum(t["hidden.weight"] @ x + t["hidden.bias"], 0) + t["out.bias"]
    np.testing.assert_allclose(net.logits(*mean_heads(prompt)), expected, rtol=1e-4, atol=1e-4)


def test_heads_that_do_not_fit() -> None:
    tensors = dict(head(0).tensors)
    with pytest.raises(FormatError, match="no queries"):
        Head.restore({name: t for name, t in tensors.items() if name != "queries"})
    with pytest.raises(FormatError, match="do not fit"):
        Head.restore(tensors | {"norm.bias": np.zeros(3, np.float32)})


def test_activation_needs_hidden_states() -> None:
    with pytest.raises(InputError, match="torch engine"):
        ActivationSchedule((4, 3), ({},), 4).start(Prompt(0), 9)


def test_a_fixed_schedule_may_rise_when_made_by_hand() -> None:
    late = FixedSchedule(((0, 3), (5, 4)))  # the ablation's late-high control; the command line refuses it
    assert trace(late, late.start(None, 9), 9) == [3] * 5 + [4] * 4  # type: ignore[arg-type]
