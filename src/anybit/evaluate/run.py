"""`anybit eval`: quality of one model on a text, and beside its float baseline."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from anybit.calibration.progress import Progress, silent
from anybit.calibration.text import read_documents
from anybit.calibration.tokens import data_identity, evaluation_windows
from anybit.evaluate.divergence import NOISE_WINDOWS, compare, divergence_summary, noise_floor
from anybit.evaluate.perplexity import paired_difference, perplexity, summarize
from anybit.loading import load_any


def evaluate(
    directory: str | Path,
    *,
    text: str,
    baseline: str | Path | None = None,
    ctx: int = 512,
    max_tokens: int | None = None,
    dtype: str = "float32",
    precision: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a model on a text; JSON-ready.

    Args:
        directory: the model, anything `load_any` takes.
        text: a file or builtin of `anybit.calibration.text`.
        baseline: the float model to compare with.
        ctx: window length in tokens; first token of a window unscored.
        max_tokens: use at most this many tokens of the text, None for all.
        dtype: of the floating-point parts of both models; the noise floor is always float32 beside bfloat16.
        precision: bits to read the nested weights of an anybit model with; default: all that are stored.

    Returns:
        `perplexity, stderr, tokens` (scored), `ctx, windows, model, text, data, dtype, precision, seconds`; with a baseline also
        the keys of `compare_with_baseline`.

    Raises:
        InputError: unreadable model or text, a precision that is not in the checkpoint, text too short, vocabularies that differ.
        PromiseError: NaN or infinite results.
    """
    started = time.perf_counter()
    progress = progress or silent
    documents = read_documents(text)  # before the slow loading: a wrong path is told at once
    model, tokenizer = load_any(directory, dtype=dtype, precision=precision)
    windows = evaluation_windows(tokenizer, documents, ctx, max_tokens)
    about = {
        "model": str(directory),
        "text": text,
        "data": data_identity(windows, text),
        "dtype": dtype,
        "precision": precision,
        "ctx": ctx,
        "windows": len(windows),
    }
    if baseline is None:
        measured = perplexity(model, windows, progress)
        numbers: dict[str, Any] = {
            "perplexity": measured.perplexity,
            "stderr": measured.stderr,
            "tokens": measured.tokens,
        }
    else:
        float_model, _ = load_any(baseline, dtype=dtype)
        numbers = {"baseline": str(baseline)} | compare_with_baseline(model, float_model, windows, progress)
    return about | numbers | {"seconds": time.perf_counter() - started}


def compare_with_baseline(
    model: PreTrainedModel, baseline: PreTrainedModel, windows: Tensor, progress: Progress = silent
) -> dict[str, Any]:
    """Paired quality of a model and its float baseline on int64 windows [W, ctx].

    Returns:
        `perplexity, stderr, tokens`, `baseline_perplexity, baseline_stderr`,
        `log_perplexity_difference` (nats, model - baseline) and `log_perplexity_difference_stderr`,
        `perplexity_ratio, perplexity_ratio_low, perplexity_ratio_high` (95 % interval),
        `kl_mean, kl_p50, kl_p90, kl_p99, kl_max, top1_agreement`,
        `kl_noise_floor` and `kl_noise_floor_windows`, how many windows it was taken on.
    """
    both = compare(model, baseline, windows, progress)
    ours, reference = summarize(both.nll), summarize(both.baseline_nll)
    pair = paired_difference(both.baseline_nll, both.nll)
    return {
        "perplexity": ours.perplexity,
        "stderr": ours.stderr,
        "tokens": ours.tokens,
        "baseline_perplexity": reference.perplexity,
        "baseline_stderr": reference.stderr,
        "log_perplexity_difference": pair.difference,
        "log_perplexity_difference_stderr": pair.stderr,
        "perplexity_ratio": pair.ratio,
        "perplexity_ratio_low": pair.ratio_low,
        "perplexity_ratio_high": pair.ratio_high,
        **divergence_summary(both.kl, both.same_top1),
        "kl_noise_floor": noise_floor(baseline, windows, progress),
        "kl_noise_floor_windows": min(NOISE_WINDOWS, len(windows)),
    }
