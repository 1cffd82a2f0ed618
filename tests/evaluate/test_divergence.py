"""KL divergence: its defining properties, a sum by hand, and the noise floor."""

import math

import pytest
import torch

from anybit.errors import InputError, PromiseError
from anybit.evaluate.divergence import compare, divergence_summary, noise_floor, token_divergence
from anybit.evaluate.perplexity import perplexity
from tiny_models import tiny, token_ids


def by_hand(reference, other):
    p, q = ([math.exp(value) for value in row.tolist()] for row in (reference.double(), other.double()))
    p, q = [value / sum(p) for value in p], [value / sum(q) for value in q]
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.fixture
def logits():
    draw = torch.Generator().manual_seed(0)
    return torch.randn(301, 37, generator=draw) * 4, torch.randn(301, 37, generator=draw) * 4


def test_matches_the_sum_by_hand_and_is_not_symmetric(logits):
    p, q = logits
    kl, _ = token_divergence(p, q)
    assert kl.shape == (301,)
    for row in (0, 127, 128, 300):  # both sides of the chunk border and the last row
        assert kl[row].item() == pytest.approx(by_hand(p[row], q[row]), rel=1e-5)
    assert abs(kl[0].item() - by_hand(q[0], p[0])) > 0.1


def test_zero_on_itself_positive_otherwise_blind_to_shifts(logits):
    p, q = logits
    assert token_divergence(p, p)[0].abs().max() == 0
    assert token_divergence(p, q)[0].min() > 0
    shifted, same = token_divergence(p, p + 100)
    assert shifted.abs().max() < 1e-4  # p + 100 is rounded to 7.6e-6 relative to units
    assert bool((same == 1).all())


def test_masked_tokens_do_not_become_nan():
    p = torch.tensor([[0.0, -float("inf"), 1.0]])
    assert token_divergence(p, p)[0].item() == 0
    expected = math.log1p(math.exp(-5) / (1 + math.e))
    measured = token_divergence(p, torch.tensor([[0.0, -5.0, 1.0]]))[0].item()
    assert measured == pytest.approx(expected, abs=5e-7)  # a few float32 roundings of log-probabilities near 1


def test_agreement_counts_equal_maxima():
    p = torch.tensor([[1.0, 2.0, 0.0], [3.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    q = torch.tensor([[0.0, 9.0, 1.0], [2.0, 3.0, 0.0], [0.0, -1.0, 0.1]])
    assert token_divergence(p, q)[1].tolist() == [1, 0, 1]


def test_summary_takes_nearest_rank_quantiles():
    kl = torch.arange(101, dtype=torch.float64)[torch.randperm(101)].view(1, 101)
    summary = divergence_summary(kl, torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert summary == {
        "kl_mean": 50,
        "kl_p50": 50,
        "kl_p90": 90,
        "kl_p99": 99,
        "kl_max": 100,
        "top1_agreement": 0.75,
    }
    kl[0, 3] = float("inf")
    with pytest.raises(PromiseError, match="NaN or infinite"):
        divergence_summary(kl, torch.ones(1))


def test_compare_holds_both_models_numbers_in_their_places():
    windows = torch.cat([token_ids(16, seed) for seed in range(3)])
    model, baseline = tiny("llama", seed=1), tiny("llama", seed=0)
    both = compare(model, baseline, windows)
    assert both.kl.shape == both.nll.shape == both.baseline_nll.shape == both.same_top1.shape == (3, 15)
    assert math.exp(both.nll.mean()) == pytest.approx(perplexity(model, windows).perplexity, rel=1e-6)
    assert math.exp(both.baseline_nll.mean()) == pytest.approx(perplexity(baseline, windows).perplexity, rel=1e-6)
    with torch.no_grad():
        reference, other = (m(input_ids=windows[1:2]).logits[0, 4] for m in (baseline, model))
    assert both.kl[1, 4].item() == pytest.approx(by_hand(reference, other), rel=1e-4)


def test_other_vocabulary_is_refused():
    with pytest.raises(InputError, match=r"the baseline has 260 .* and the model 300"):
        compare(tiny("llama", vocab_size=300), tiny("llama"), token_ids(8))


def test_noise_floor_is_small_positive_and_leaves_the_model_alone():
    model, windows = tiny("llama"), torch.cat([token_ids(16, seed) for seed in range(6)])
    floor = noise_floor(model, windows)
    assert 1e-7 < floor < 0.02  # bfloat16 keeps 8 bits: logits of a few units move by about 1 %, KL by half its square
    assert model.dtype == torch.float32
    assert floor == pytest.approx(noise_floor(model, windows[:4]), rel=1e-6)
    assert floor != pytest.approx(noise_floor(model, windows[:3]), rel=1e-6)
    assert noise_floor(tiny("llama").bfloat16(), windows) > 0
