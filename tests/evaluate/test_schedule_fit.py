"""Training of heads: learns what can be learned, and nothing where there is nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from anybit.engine.schedulers.head import Head, softmax
from anybit.errors import InputError
from anybit.evaluate.schedules.fit import AttentionHead, MeanHead, Settings, balanced, fit
from anybit.evaluate.schedules.labels import Labelled
from anybit.evaluate.schedules.train import train_pair

HEADS, WIDTH, CLASSES = 2, 8, 4
FAST = Settings(epochs=8, accumulate=8, lr=5e-3)


def examples(count: int, seed: int, separable: bool, prior=(0.25,) * 4) -> list[Labelled]:
    """Keys are noise; where `separable`, one token's key stands out and its value tells the class."""
    draw = np.random.default_rng(seed)
    patterns = np.random.default_rng(99).normal(size=(CLASSES, WIDTH)).astype(np.float32) * 2
    found = []
    for _ in range(count):
        label = int(draw.choice(CLASSES, p=prior))
        tokens = int(draw.integers(5, 12))
        keys, values = draw.normal(size=(2, tokens, WIDTH)).astype(np.float32)
        if separable:
            at = int(draw.integers(tokens))
            keys[at] += 3
            values[at] += patterns[label]
        found.append(Labelled((keys, values), (0.0,) * 4, label, HEADS))
    return found


def accuracy(tensors, cases: list[Labelled]) -> float:
    head = Head.restore(tensors)
    return float(np.mean([int(head.logits(*case.features).argmax()) == case.label for case in cases]))


def test_separable_features_are_learned() -> None:
    fitted = train_pair(examples(400, 0, True), FAST, trials=0)
    assert accuracy(fitted.tensors, examples(300, 1, True)) > 0.9
    assert fitted.facts["eval_accuracy"] > 0.9
    assert fitted.facts["curve"][-1] < fitted.facts["curve"][0]
    assert not fitted.facts["collapsed"]


def test_random_labels_do_not_beat_the_prior() -> None:
    prior = (0.2, 0.2, 0.2, 0.4)
    fitted = train_pair(examples(300, 2, False, prior), FAST, trials=0)
    fresh = examples(400, 3, False, prior)
    common = float(np.mean([case.label == 3 for case in fresh]))
    assert accuracy(fitted.tensors, fresh) < common + 0.03
    sure = [softmax(Head.restore(fitted.tensors).logits(*case.features))[case.label] for case in fresh]
    assert -np.mean(np.log(sure)) > -np.mean([np.log(prior[case.label]) for case in fresh]) - 0.01


def test_the_two_networks_are_one() -> None:
    torch.manual_seed(0)
    net = AttentionHead(3, WIDTH, CLASSES, 0.5).eval()
    tensors = {name: t.detach().numpy() for name, t in net.state_dict().items()}
    head = Head.restore(tensors)
    for case in examples(20, 4, True):
        with torch.inference_mode():
            expected = net(*(torch.from_numpy(part) for part in case.features)).numpy()
        np.testing.assert_allclose(head.logits(*case.features), expected, rtol=1e-4, atol=1e-5)


def test_training_is_deterministic_and_the_double_softmax_has_its_floor() -> None:
    cases = examples(120, 5, True)
    first, again = (train_pair(cases, FAST, 0) for _ in range(2))
    assert all((first.tensors[name] == again.tensors[name]).all() for name in first.tensors)
    exact = train_pair(cases, Settings(epochs=8, accumulate=8, lr=5e-3, paper_exact=True), 0)
    # softmax twice: the loss cannot fall below log(e + 3) - 1 = 0.744 with four classes (methods/pmpd.md 2.4)
    assert 0.743 < exact.facts["train_loss"] < 1.4
    assert first.facts["train_loss"] < 0.743


def test_balance() -> None:
    import random

    labels = [0] * 10 + [1] * 3 + [3]
    chosen = balanced(labels, random.Random(0))
    assert sorted(labels[at] for at in chosen) == [0] * 10 + [1] * 10 + [3] * 10
    assert set(chosen) == set(range(14))


def test_too_little_to_learn_from() -> None:
    with pytest.raises(InputError, match="19 examples"):
        train_pair(examples(19, 0, True), FAST, 0)
    same = [Labelled(case.features, case.scores, 3, HEADS) for case in examples(40, 0, True)]
    with pytest.raises(InputError, match=r"classes \[3\] train nothing"):
        train_pair(same, FAST, 0)


def test_activation_head_learns_from_means() -> None:
    draw = np.random.default_rng(0)
    labels = [int(label) for label in draw.integers(0, CLASSES, 200)]
    means = [
        (np.eye(CLASSES, 12, dtype=np.float32)[label] * 3 + draw.normal(size=12).astype(np.float32) * 0.3,)
        for label in labels
    ]
    fitted = fit(lambda: MeanHead(12, CLASSES), means, labels, FAST)
    assert fitted.facts["eval_accuracy"] > 0.9
    assert set(fitted.tensors) == {"hidden.weight", "hidden.bias", "out.weight", "out.bias"}


def test_a_search_needs_optuna() -> None:
    with pytest.raises(InputError, match="needs optuna"):
        train_pair(examples(40, 0, True), FAST, trials=3)
