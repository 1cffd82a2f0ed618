"""ROUGE-L, stems, agreement and intervals, against slow and published answers."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from anybit.errors import InputError
from anybit.evaluate.agreement import (
    agreed_start,
    common_subsequence,
    rouge_l,
    token_agreement,
    vector_agreement,
    words,
)
from anybit.evaluate.bootstrap import paired_bootstrap
from anybit.evaluate.porter import stem

# From Porter's paper, its rules' examples put through all steps, and words that catch a step left out.
STEMS = (
    "caresses:caress ponies:poni ties:ti cats:cat feed:feed agreed:agre plastered:plaster bled:bled motoring:motor sing:sing "
    "conflated:conflat troubled:troubl sized:size hopping:hop tanned:tan falling:fall hissing:hiss fizzed:fizz failing:fail "
    "filing:file happy:happi sky:sky relational:relat conditional:condit rational:ration valenci:valenc digitizer:digit "
    "conformabli:conform radicalli:radic differentli:differ vileli:vile analogousli:analog vietnamization:vietnam "
    "predication:predic operator:oper feudalism:feudal decisiveness:decis hopefulness:hope callousness:callous "
    "formaliti:formal sensitiviti:sensit sensibiliti:sensibl triplicate:triplic formative:form formalize:formal "
    "electriciti:electr electrical:electr hopeful:hope goodness:good revival:reviv allowance:allow inference:infer "
    "airliner:airlin gyroscopic:gyroscop adjustable:adjust defensible:defens irritant:irrit replacement:replac "
    "adjustment:adjust dependent:depend adoption:adopt homologou:homolog communism:commun activate:activ angulariti:angular "
    "homologous:homolog effective:effect bowdlerize:bowdler probate:probat rate:rate cease:ceas controll:control roll:roll "
    "generalizations:gener oscillators:oscil yesterday:yesterdai syzygy:syzygi"
)


def test_stems() -> None:
    wrong = [
        (word, stem(word), want) for word, want in (pair.split(":") for pair in STEMS.split()) if stem(word) != want
    ]
    assert not wrong


def slow_common(a: list[int], b: list[int]) -> int:
    """By trying all subsequences of the shorter."""

    def inside(part: tuple[int, ...]) -> bool:
        rest = iter(b)
        return all(x in rest for x in part)

    return max(n for n in range(len(a) + 1) if any(inside(part) for part in itertools.combinations(a, n)))


def test_common_subsequence() -> None:
    draw = random.Random(0)
    for _ in range(60):
        a, b = ([draw.randrange(4) for _ in range(draw.randrange(9))] for _ in range(2))
        assert common_subsequence(a, b) == slow_common(a, b)


def test_rouge_by_hand() -> None:
    # police killed the gunman / police kill the gunman: three of four words in order; all four after stemming
    assert rouge_l("police kill the gunman", "Police killed the gunman!", stemmed=False) == pytest.approx(0.75)
    assert rouge_l("police kill the gunman", "Police killed the gunman!") == 1.0
    assert rouge_l("the gunman kill police", "police killed the gunman", stemmed=False) == pytest.approx(0.5)
    # precision 2/3, recall 2/4
    assert rouge_l("a b x", "a b c d", stemmed=False) == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))
    assert rouge_l("", "a") == rouge_l("...", "a") == rouge_l("a", "b") == 0.0
    assert words("It's 3.5-fold, ÉCOLE") == ["it", "s", "3", "5", "fold", "cole"]


def test_token_agreement() -> None:
    assert token_agreement([1, 2, 3], [1, 9, 3, 4]) == 0.5
    assert token_agreement([], []) == 1.0
    assert agreed_start([1, 2, 3], [1, 2, 4]) == 2
    assert agreed_start([1, 2], [1, 2, 4]) == 2


def test_vector_agreement() -> None:
    a = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    assert vector_agreement(a, a[::-1] * 3) == pytest.approx(1.0, abs=1e-6)
    assert vector_agreement(a[:2], a) < vector_agreement(a[:4], a) < 1
    assert vector_agreement(a[:0], a) == 0.0


def test_the_interval_covers_as_often_as_it_says() -> None:
    draw, hits = np.random.default_rng(0), 0
    for seed in range(200):
        a, b = draw.normal(0.3, 1, (2, 60))
        b = b * 0.2 + a * 0.8 - 0.3  # true mean difference: 0.3 + 0.2 * (0.3 - 0.3) = 0.3
        found = paired_bootstrap(list(a), list(b), draws=600, seed=seed)
        hits += found.low <= 0.3 <= found.high
    assert 178 <= hits <= 199
    flat = paired_bootstrap([1.0, 2.0], [0.5, 1.5])
    assert (flat.mean, flat.low, flat.high, flat.wins, flat.significant) == (0.5, 0.5, 0.5, 1.0, True)
    with pytest.raises(InputError, match="pairs"):
        paired_bootstrap([1.0], [])
