"""Drafters by themselves: tables worked out by hand, cost, and when guessing stops."""

import random
import time

import pytest

from anybit.engine.drafting.lookup import LookupDrafter
from anybit.engine.drafting.ngram import NgramDrafter
from anybit.engine.drafting.pace import Pace
from anybit.engine.drafting.self_speculation import draft_bits

#         0  1  2  3  4  5  6  7  8  9 10 11
STREAM = [1, 2, 3, 1, 2, 4, 1, 2, 3, 5, 1, 2]


@pytest.mark.parametrize(
    ("order", "tail", "level", "guess"),
    [
        # after 1 2: 3 (twice), 4 (once); after 2 3: 1, then 5: equal, the later wins; after 3 5: 1
        (3, [], 2, [3, 5, 1, 2]),
        # after 5 1 2 nothing yet, so the longest known context is 1 2; then 1 2 3: 1 or 5, later 5
        (5, [], 2, [3, 5, 1, 2]),
        # bigrams alone: after 2: 3 3 4; after 3: 1, 5 -> 5; after 5: 1; after 1: 2
        (2, [], 1, [3, 5, 1, 2]),
        # 9 was never seen: nothing, although the text goes on
        (5, [9], 0, []),
        # 2 4 1: after it 2; then 4 1 2: 3
        (4, [4, 1], 3, [2, 3, 5, 1]),
        # a second 4 makes it 3 3 4 4 after 1 2: equal counts, 4 is later; then 2 4 -> 1 (once), then 4 1 -> 2
        (3, [4, 1, 2], 2, [4, 1, 2, 4]),
    ],
)
def test_counts_order_and_ties(order, tail, level, guess):
    drafter = NgramDrafter(order)
    drafter.start(STREAM)
    drafter.update(tail)
    assert drafter.level == level
    assert drafter.propose(4) == guess
    assert drafter.propose(4) == guess  # guessing leaves no trace


def test_nothing_goes_round_from_the_end_to_the_start():
    drafter = NgramDrafter(3)
    drafter.start([7, 8, 9])
    assert drafter.level == 0
    drafter.start([7, 8, 9, 8])
    assert drafter.propose(3) == [9, 8, 9]  # 8 -> 9, 9 -> 8; 7 never came back
    drafter.start([])
    assert (drafter.level, drafter.propose(3)) == (0, [])


def test_shortest_context_and_excluded_positions():
    drafter = NgramDrafter(4, shortest=2)
    drafter.start([1, 2, 3, 9, 2])
    assert drafter.level == 0  # only the unigram 2 is known
    drafter.update([3])
    assert drafter.propose(1) == [9]
    without = NgramDrafter(4, excluded=[range(1, 3)])
    without.start([1, 2, 3, 4, 1])
    assert without.level == 0  # what followed 1 stands in the template
    without.update([4])
    assert without.propose(2) == [1, 4]


def slow_ngram(ids, order, limit):
    """Counts of all runs, made anew for every token."""
    guess = []
    while len(guess) < limit:
        text = ids + guess
        for level in range(order - 1, 0, -1):
            context = text[len(text) - level :]
            ends = (
                [at for at in range(level, len(ids)) if ids[at - level : at] == context] if len(text) >= level else []
            )
            if ends:
                counts = {ids[at]: sum(ids[a] == ids[at] for a in ends) for at in ends}
                guess.append(max(ends, key=lambda at: (counts[ids[at]], at)))
                guess[-1] = ids[guess[-1]]
                break
        else:
            return guess
    return guess


@pytest.mark.parametrize("order", [2, 3, 5])
def test_ngrams_against_counting_everything_again(order):
    draw, drafter, ids = random.Random(order), NgramDrafter(order), []
    drafter.start([])
    for _ in range(150):
        token = draw.choice([1, 1, 2, 3, 4])
        ids.append(token)
        drafter.update([token])
        assert drafter.propose(5) == slow_ngram(ids, order, 5)


def slow_lookup(ids, longest, shortest, deepest, first):
    for length in range(deepest, shortest - 1, -1):
        places = [at for at in range(length, len(ids)) if ids[at - length : at] == ids[len(ids) - length :]]
        if places:
            text = list(ids)
            place = places[0] if first else places[-1]
            for at in range(place, place + longest):
                text.append(text[at])
            return length, text[len(ids) :]
    return 0, []


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(("shortest", "deepest"), [(1, 3), (2, 4), (1, 1)])
def test_lookup_against_searching(first, shortest, deepest):
    draw, drafter, ids = random.Random(1), LookupDrafter(7, shortest, deepest, first), []
    for _ in range(120):
        ids.append(draw.choice([1, 1, 2, 3]))
        drafter.update(ids[-1:])
        assert (drafter.level, drafter.propose(7)) == slow_lookup(ids, 7, shortest, deepest, first)
    drafter.start([5])
    assert drafter.propose(7) == []


@pytest.mark.parametrize("drafter", [NgramDrafter(), LookupDrafter()])
def test_a_step_costs_little_however_long_the_text(drafter):
    draw = random.Random(0)
    drafter.start([draw.randrange(2000) for _ in range(100_000)])
    times = []
    for _ in range(2000):
        began = time.perf_counter()
        drafter.update([draw.randrange(2000)])
        drafter.propose(7 if drafter.level else 0)
        times.append(time.perf_counter() - began)
    assert sorted(times)[1000] < 50e-6


def simulate(share, tokens=2000, slope=0.2, pace=None, guessing=0.0, levels=1):
    """Time of a text over plain decoding where each guessed token is right with probability `share`."""
    pace, draw, now, done = pace or Pace(), random.Random(0), 0.0, 0
    while done < tokens:
        level = draw.randrange(levels) + 1
        count = pace.length(level, 4, 7)
        seconds = 1 + slope * count
        now += seconds + guessing * count
        pace.passed(4, count + 1, seconds)
        right = next((at for at in range(count) if draw.random() >= share), count)
        pace.judged(level, 4, count, right, guessing * count)
        if not count and not guessing:
            pace.seen(level, 4, draw.random() < share)
        done += 1 + right
    return now / tokens


def test_guessing_stops_where_it_does_not_pay_and_goes_on_where_it_does():
    assert simulate(0.0) < 1.012
    assert simulate(0.0, tokens=64) < 1.02
    assert simulate(0.1, slope=0.5) < 1.02
    assert simulate(0.0, levels=500) < 1.012  # every guess looks as good as the first
    assert simulate(0.95) < 0.45
    assert simulate(0.6) < 0.9
    assert simulate(0.0, pace=Pace((0.7,), allowance=3.0, tries=True), guessing=0.6) < 1.015
    assert simulate(0.9, pace=Pace((0.7,), allowance=3.0, tries=True), guessing=0.3) < 0.8
    assert simulate(0.9, pace=Pace((0.7,), allowance=3.0, tries=True), guessing=1.0) < 1.015


def test_a_text_that_begins_to_repeat_is_noticed():
    pace = Pace()
    simulate(0.0, pace=pace)
    assert simulate(0.95, tokens=400, pace=pace) < 0.7
    assert simulate(0.0, pace=pace) < 1.015


def test_precision_to_guess_at():
    assert [draft_bits((2, 3, 4, 6, 8), bits) for bits in (2, 3, 4, 6, 8)] == [None, 2, 2, 3, 4]
