"""How far a quantized model's next-token distributions are from the float model's, token by token.

KL(float || quantized) in nats and agreement of the most likely token, over the same scored positions as perplexity. A
number is meaningful only beside its noise floor: the divergence of the float model from itself run in bfloat16.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from anybit.calibration.progress import Progress, silent
from anybit.errors import InputError, PromiseError
from anybit.evaluate.perplexity import ROWS, scored_logits, token_nll, window_batches

NOISE_WINDOWS = 4
"""Windows for the noise floor: it is an order of magnitude to compare with, and bfloat16 is slow on many CPUs."""


@dataclass(frozen=True)
class Comparison:
    """Per scored token of the same windows, float64 [W, ctx - 1] each.

    Attributes:
        nll: negative log-likelihood under the model, nats.
        baseline_nll: the same under the baseline.
        kl: KL(baseline || model), nats, >= 0 up to float32 rounding.
        same_top1: 1.0 where both find the same token most likely, else 0.0.
    """

    nll: Tensor
    baseline_nll: Tensor
    kl: Tensor
    same_top1: Tensor


@torch.inference_mode()
def token_divergence(reference: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """KL(reference || other) in nats and equality of the arg max, float64 [T] each, of two logits [T, vocabulary]."""
    kls, agreements = [], []
    for rows, other_rows in zip(torch.split(reference, ROWS), torch.split(other, ROWS), strict=True):
        log_p = rows.float().log_softmax(-1)
        log_q = other_rows.float().log_softmax(-1)
        # a token that cannot come (masked to -inf) adds nothing, though 0 * (-inf - -inf) is NaN
        terms = torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q))
        kls.append(terms.sum(-1))
        agreements.append(rows.argmax(-1) == other_rows.argmax(-1))
    return torch.cat(kls).double().cpu(), torch.cat(agreements).double().cpu()


def compare(
    model: PreTrainedModel, baseline: PreTrainedModel, windows: Tensor, progress: Progress = silent
) -> Comparison:
    """Run both models over int64 windows [W, ctx], a few at a time, keeping only per-token numbers.

    Raises:
        InputError: the models have different vocabularies.
    """
    parts: list[tuple[Tensor, ...]] = []
    done = 0
    for batch in window_batches(baseline, windows):
        reference, other = scored_logits(baseline, batch), scored_logits(model, batch)
        if reference.shape != other.shape:
            raise InputError(
                f"the baseline has {reference.shape[1]} tokens in its vocabulary and the model {other.shape[1]}: "
                "give the float model this one was quantized from"
            )
        targets = batch[:, 1:].flatten()
        kl, same = token_divergence(reference, other)
        parts.append(
            tuple(
                values.view(len(batch), -1)
                for values in (token_nll(other, targets), token_nll(reference, targets), kl, same)
            )
        )
        done += len(batch)
        progress("compare", done, len(windows))
    return Comparison(*(torch.cat(values) for values in zip(*parts, strict=True)))


def noise_floor(model: PreTrainedModel, windows: Tensor, progress: Progress = silent) -> float:
    """Mean KL(model in float32 || model in bfloat16) in nats over the first `NOISE_WINDOWS` of windows [W, ctx]."""
    exact = model if model.dtype == torch.float32 else copy.deepcopy(model).float()
    rounded = copy.deepcopy(model).bfloat16()
    quiet_windows = windows[:NOISE_WINDOWS]
    return (
        compare(rounded, exact, quiet_windows, lambda _, done, total: progress("noise floor", done, total))
        .kl.mean()
        .item()
    )


def divergence_summary(kl: Tensor, same_top1: Tensor) -> dict[str, float]:
    """`kl_mean, kl_p50, kl_p90, kl_p99, kl_max` (nats per token) and `top1_agreement` (0..1) of per-token values.

    Raises:
        PromiseError: a divergence is NaN or infinite.
    """
    if not kl.isfinite().all():
        raise PromiseError("the divergence from the baseline is NaN or infinite; inspect the model's scales and norms")
    p50, p90, p99 = _quantiles(kl, (0.5, 0.9, 0.99))
    return {
        "kl_mean": kl.mean().item(),
        "kl_p50": p50,
        "kl_p90": p90,
        "kl_p99": p99,
        "kl_max": kl.max().item(),
        "top1_agreement": same_top1.mean().item(),
    }


def _quantiles(values: Tensor, levels: tuple[float, ...]) -> list[float]:
    """Nearest-rank quantiles. (torch.quantile refuses more than 2^24 values.)"""
    ordered = values.flatten().sort().values
    return [ordered[round(level * (len(ordered) - 1))].item() for level in levels]
