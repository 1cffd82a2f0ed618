"""Perplexity and its uncertainty.

Convention: non-overlapping windows of ctx tokens, each seen by the model on its own; the first token of a window is not
scored (it has no context), so every window scores ctx - 1 tokens and perplexity = exp(mean negative log-likelihood).

Uncertainty: tokens of one window are correlated, windows much less, so all standard errors are over window means. A
model and its quantized copy are wrong on the same windows, so their *paired* difference is far sharper than the two
perplexities.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from anybit.calibration.progress import Progress, silent
from anybit.errors import PromiseError

ROWS = 128
"""Rows of logits normalised at a time: bounds the temporaries to a few copies of [ROWS, vocabulary] float32."""

_BATCH_LOGITS = 64 * 2**20
"""Most logits in one forward pass (256 MB in float32), unless a single window has more."""


@dataclass(frozen=True)
class Perplexity:
    """`perplexity` over `tokens` scored tokens; `stderr` is its standard error, None with a single window."""

    perplexity: float
    stderr: float | None
    tokens: int


@dataclass(frozen=True)
class PairedDifference:
    """Log-perplexity of B minus that of A on the same windows; `ratio` = perplexity B / A with its 95 % interval.

    With a single window nothing is known about the spread: `stderr`, `ratio_low` and `ratio_high` are None.
    """

    difference: float
    stderr: float | None
    ratio: float
    ratio_low: float | None
    ratio_high: float | None


def perplexity(model: PreTrainedModel, windows: Tensor, progress: Progress = silent) -> Perplexity:
    """Perplexity of a causal language model on int64 windows [W, ctx].

    Raises:
        PromiseError: the model produced NaN or infinite likelihoods.
    """
    scores = []
    for batch in window_batches(model, windows):
        scores.append(token_nll(scored_logits(model, batch), batch[:, 1:].flatten()).view(len(batch), -1))
        progress("perplexity", sum(map(len, scores)), len(windows))
    return summarize(torch.cat(scores))


def window_batches(model: PreTrainedModel, windows: Tensor) -> Iterator[Tensor]:
    """`windows` [W, ctx] in runs of rows small enough for their logits to stay in memory."""
    per_window = windows.shape[1] * model.config.get_text_config().vocab_size
    return iter(torch.split(windows, max(1, _BATCH_LOGITS // per_window)))


@torch.inference_mode()
def scored_logits(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """Logits [B * (ctx - 1), vocabulary] that predict tokens 1..ctx-1 of windows [B, ctx], in the model's dtype."""
    logits = model(input_ids=windows.to(model.device), use_cache=False).logits
    return logits[:, :-1].flatten(0, 1)


@torch.inference_mode()
def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats, float64 [T] on the CPU, of int64 targets [T] under logits [T, vocabulary]."""
    parts = [
        torch.nn.functional.cross_entropy(rows.float(), wanted.to(rows.device), reduction="none")
        for rows, wanted in zip(torch.split(logits, ROWS), torch.split(targets, ROWS), strict=True)
    ]
    return torch.cat(parts).double().cpu()


def summarize(nll: Tensor) -> Perplexity:
    """Perplexity from per-token negative log-likelihoods [W, ctx - 1].

    Standard error by the delta method: d exp(m) = exp(m) dm, with the standard error of the mean over windows for dm.
    """
    if not nll.isfinite().all():
        window = int((~nll.isfinite()).any(dim=1).nonzero()[0])
        raise PromiseError(
            f"the model gives NaN or infinite likelihoods (window {window}); inspect its scales and norms"
        )
    value = math.exp(nll.mean().item())
    error = standard_error(nll.mean(dim=1))
    return Perplexity(value, None if error is None else value * error, nll.numel())


def paired_difference(nll_a: Tensor, nll_b: Tensor) -> PairedDifference:
    """Compare two models' negative log-likelihoods [W, ctx - 1] of the same windows."""
    differences = (nll_b - nll_a).mean(dim=1)
    mean, error = differences.mean().item(), standard_error(differences)
    if error is None:
        return PairedDifference(mean, None, math.exp(mean), None, None)
    half = student_t_975(len(differences) - 1) * error
    return PairedDifference(mean, error, math.exp(mean), math.exp(mean - half), math.exp(mean + half))


def standard_error(window_means: Tensor) -> float | None:
    """Standard error of the mean of [W] values; None for W = 1."""
    count = len(window_means)
    return None if count < 2 else window_means.std(correction=1).item() / math.sqrt(count)


def student_t_975(freedom: int) -> float:
    """97.5 % quantile of Student's t, within 1 % for every `freedom` >= 1: with few windows 1.96 promises too much.

    Closed forms for 1 and 2 degrees of freedom, the Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5) above.
    """
    if freedom == 1:
        return math.tan(0.475 * math.pi)
    if freedom == 2:
        return 0.95 * math.sqrt(2 / (4 * 0.975 * 0.025))
    z = 1.959963984540054
    series = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(series, start=1))
