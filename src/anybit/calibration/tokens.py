"""Documents to token tensors: random calibration segments, consecutive evaluation windows, and their identity.

Tokenizers are called without special tokens: segments and windows start in the middle of text anyway.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from anybit.errors import CalibrationError, InputError

SEPARATOR = "\n\n"


def calibration_tokens(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], *, samples: int, seq_len: int, seed: int
) -> Tensor:
    """Random segments of the documents, no token position used twice; deterministic in `seed`.

    One random segment per document of at least `seq_len` tokens, in shuffled order; when there are fewer such documents
    than samples, further disjoint segments of them; when even those do not suffice, consecutive segments of all
    documents joined by a blank line.

    Returns:
        int64 [samples, seq_len]

    Raises:
        CalibrationError: sizes below 1, or fewer than samples * seq_len tokens of text.
    """
    if samples < 1 or seq_len < 1:
        raise CalibrationError(f"--samples and --seq-len must be at least 1, not {samples} and {seq_len}")
    rng = random.Random(seed)
    shuffled = rng.sample(list(documents), len(documents))
    slots: list[list[list[int]]] = []  # per long document: its disjoint segments, in random order
    for document in shuffled:
        if len(slots) == samples:
            break
        ids = _encode(tokenizer, document)
        if len(ids) >= seq_len:
            slots.append(_disjoint_segments(ids, seq_len, rng))
    if sum(map(len, slots)) >= samples:
        return torch.tensor(_round_robin(slots, samples))
    return _from_stream(tokenizer, shuffled, samples, seq_len)


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], ctx: int, max_tokens: int | None = None
) -> Tensor:
    """Consecutive non-overlapping windows of the documents joined by a blank line; the remainder is dropped.

    Documents are encoded one by one, so a larger `max_tokens` only appends windows.

    Args:
        ctx: tokens per window, at least 2 (the first one is context only).
        max_tokens: use at most this many tokens, None for all.

    Returns:
        int64 [W, ctx] with W >= 1

    Raises:
        InputError: bad sizes, or text shorter than one window.
    """
    if ctx < 2:
        raise InputError(f"--ctx must be at least 2, not {ctx}: the first token of a window is not scored")
    if max_tokens is not None and max_tokens < ctx:
        raise InputError(f"--max-tokens {max_tokens} is less than one window of --ctx {ctx}; raise it or lower --ctx")
    ids: list[int] = []
    for piece in _stream(tokenizer, documents):
        ids += piece
        if max_tokens is not None and len(ids) >= max_tokens:
            ids = ids[:max_tokens]
            break
    windows = len(ids) // ctx
    if windows == 0:
        raise InputError(
            f"the text has {len(ids)} tokens, less than one window of --ctx {ctx}; lower --ctx or give more text"
        )
    return torch.tensor(ids[: windows * ctx]).view(windows, ctx)


def data_identity(tokens: Tensor, source: str) -> dict[str, Any]:
    """What exactly a run saw: `{"source", "shape", "sha256"}`; the hash covers the little-endian int64 tokens."""
    data = tokens.to("cpu", torch.int64).contiguous().numpy().astype("<i8").tobytes()
    return {"source": source, "shape": list(tokens.shape), "sha256": hashlib.sha256(data).hexdigest()}


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: a document longer than the model's context is expected here, not worth a warning
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _stream(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str]) -> Iterator[list[int]]:
    for at, document in enumerate(documents):
        yield _encode(tokenizer, document + (SEPARATOR if at + 1 < len(documents) else ""))


def _disjoint_segments(ids: list[int], seq_len: int, rng: random.Random) -> list[list[int]]:
    count = len(ids) // seq_len
    first = rng.randint(0, len(ids) - count * seq_len)
    segments = [ids[first + at * seq_len : first + (at + 1) * seq_len] for at in range(count)]
    rng.shuffle(segments)
    return segments


def _round_robin(slots: list[list[list[int]]], samples: int) -> list[list[int]]:
    """The first segment of every document, then the second of every one, and so on: as many documents as possible."""
    deepest = max(map(len, slots))
    taken = [slot[at] for at in range(deepest) for slot in slots if at < len(slot)]
    return taken[:samples]


def _from_stream(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], samples: int, seq_len: int) -> Tensor:
    needed = samples * seq_len
    ids: list[int] = []
    for piece in _stream(tokenizer, documents):
        ids += piece
        if len(ids) >= needed:
            return torch.tensor(ids[:needed]).view(samples, seq_len)
    raise CalibrationError(
        f"the calibration text has {len(ids)} tokens but {samples} samples of {seq_len} need {needed}; "
        "give more text or lower --samples or --seq-len"
    )
