"""Perplexity against a slow oracle, and its uncertainty against simulation."""

import math

import pytest
import torch

from anybit.errors import PromiseError
from anybit.evaluate import perplexity as module
from anybit.evaluate.perplexity import (
    paired_difference,
    perplexity,
    scored_logits,
    standard_error,
    student_t_975,
    summarize,
    token_nll,
)
from tiny_models import tiny, token_ids


@pytest.fixture(scope="module")
def windows():
    return torch.cat([token_ids(10, seed) for seed in range(5)])


def oracle(model, windows):
    """One prefix at a time, in float64, normalising by hand: log-likelihoods of tokens 1..ctx-1 of each window."""
    model = model.double()
    rows = []
    for window in windows:
        row = []
        for at in range(1, len(window)):
            with torch.no_grad():
                logits = model(input_ids=window[None, :at], use_cache=False).logits[0, -1]
            total = sum(math.exp(value) for value in logits.tolist())
            row.append(-math.log(math.exp(logits[window[at]]) / total))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_equals_the_slow_oracle(family, windows):
    expected = oracle(tiny(family), windows)
    measured = perplexity(tiny(family), windows)
    assert measured.tokens == 5 * 9
    # float32 logits of a few units carry errors of ~1e-6; the mean of 45 of them less
    assert measured.perplexity == pytest.approx(math.exp(expected.mean()), rel=1e-5)
    means = expected.mean(dim=1)
    by_hand = math.exp(means.mean()) * math.sqrt(((means - means.mean()) ** 2).sum() / 4 / 5)
    assert measured.stderr == pytest.approx(by_hand, rel=1e-3)


def test_batches_and_row_chunks_do_not_matter(windows, monkeypatch):
    model = tiny("llama")
    expected = perplexity(model, windows).perplexity
    seen = []
    monkeypatch.setattr(module, "_BATCH_LOGITS", 2 * 10 * 260)
    monkeypatch.setattr(module, "ROWS", 7)
    measured = perplexity(model, windows, lambda *report: seen.append(report))
    assert measured.perplexity == pytest.approx(expected, rel=1e-6)
    assert seen == [("perplexity", 2, 5), ("perplexity", 4, 5), ("perplexity", 5, 5)]


def test_uniform_model_has_the_vocabulary_as_perplexity():
    logits, targets = torch.zeros(300, 50), torch.arange(300) % 50
    assert summarize(token_nll(logits, targets).view(3, 100)).perplexity == pytest.approx(50, rel=1e-6)


def test_scored_logits_predict_the_next_token(windows):
    model = tiny("llama")
    with torch.no_grad():
        everything = model(input_ids=windows).logits
    scored = scored_logits(model, windows)
    assert scored.shape == (5 * 9, 260)
    torch.testing.assert_close(scored.view(5, 9, 260)[2, 7], everything[2, 7])


def test_nan_is_reported_not_averaged():
    nll = torch.ones(4, 3)
    nll[2, 1] = float("nan")
    with pytest.raises(PromiseError, match=r"NaN or infinite likelihoods \(window 2\)"):
        summarize(nll)


def test_one_window_has_no_standard_error():
    only = torch.tensor([[1.0, 2.0]])
    assert summarize(only).stderr is None
    pair = paired_difference(only, only + 1)
    assert (pair.difference, pair.stderr, pair.ratio_low, pair.ratio_high) == (1.0, None, None, None)
    assert pair.ratio == pytest.approx(math.e)


def test_stderr_is_the_spread_over_repeated_texts():
    """2000 texts of 24 windows whose tokens share a window effect: the stated error is the one that is seen."""
    draw = torch.Generator().manual_seed(0)
    window = torch.randn(2000, 24, 1, generator=draw, dtype=torch.float64) * 0.4
    token = torch.randn(2000, 24, 32, generator=draw, dtype=torch.float64)
    nll = 3 + window + token
    results = [summarize(text) for text in nll]
    seen = torch.tensor([result.perplexity for result in results]).std().item()
    stated = torch.tensor([result.stderr for result in results]).mean().item()
    assert stated == pytest.approx(seen, rel=0.07)  # 2000 draws fix a standard deviation to 1.6 %
    ignoring_windows = math.exp(3) * nll[0].std().item() / math.sqrt(24 * 32)
    assert ignoring_windows < 0.6 * seen  # so the agreement above is not automatic


def test_paired_interval_covers_the_truth_as_often_as_it_says():
    draw = torch.Generator().manual_seed(1)
    shared = torch.randn(2000, 5, 8, generator=draw, dtype=torch.float64) * 3  # hard windows are hard for both
    noise = torch.randn(2000, 5, 8, generator=draw, dtype=torch.float64) * 0.1
    pairs = [paired_difference(a, b) for a, b in zip(shared, shared + 0.05 + noise, strict=True)]
    covered = sum(pair.ratio_low <= math.exp(0.05) <= pair.ratio_high for pair in pairs) / 2000
    assert covered == pytest.approx(0.95, abs=0.015)  # 3 sigma of a binomial; 1.96 instead of t gives 0.88
    assert pairs[0].ratio_low < pairs[0].ratio < pairs[0].ratio_high


def test_student_t_against_tables():
    table = {1: 12.706, 2: 4.3027, 3: 3.1824, 4: 2.7764, 7: 2.3646, 10: 2.2281, 30: 2.0423, 1000: 1.9623}
    for freedom, value in table.items():
        assert student_t_975(freedom) == pytest.approx(value, rel=0.01)


def test_standard_error_by_hand():
    assert standard_error(torch.tensor([1.0, 3.0])) == pytest.approx(1.0)
    assert standard_error(torch.tensor([2.0])) is None
