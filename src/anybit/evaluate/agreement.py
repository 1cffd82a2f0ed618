"""How much two texts agree: ROUGE-L, tokens in place, and meaning by the float model's own word vectors.

Made for a model's text beside the float model's text on the same prompt: perplexity does not exercise a schedule.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from anybit.evaluate.porter import stem

Array = NDArray[np.float32]
STEMMED_FROM = 4
"""Letters a word needs to be stemmed, as in the rouge-score package."""


def words(text: str, *, stemmed: bool = False) -> list[str]:
    """Runs of a-z and 0-9 of the lower-cased text."""
    found = re.findall(r"[a-z0-9]+", text.lower())
    return [stem(word) if len(word) >= STEMMED_FROM else word for word in found] if stemmed else found


def common_subsequence(a: Sequence[object], b: Sequence[object]) -> int:
    """Length of the longest common subsequence."""
    best = [0] * (len(b) + 1)
    for left in a:
        diagonal = 0
        for j, right in enumerate(b):
            above = best[j + 1]
            best[j + 1] = diagonal + 1 if left == right else max(above, best[j])
            diagonal = above
    return best[-1]


def rouge_l(text: str, reference: str, *, stemmed: bool = True) -> float:
    """F of precision and recall of the longest common subsequence of words, 0..1; 0 where either has no word.

    `stemmed` is for final scores; labels are made without (methods/pmpd.md 2.6).
    """
    ours, theirs = words(text, stemmed=stemmed), words(reference, stemmed=stemmed)
    common = common_subsequence(ours, theirs)
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0  # = 2 P R / (P + R)


def token_agreement(ids: Sequence[int], reference: Sequence[int]) -> float:
    """Share of positions, of the longer text's, that hold the same token; 1 for two empty texts."""
    longer = max(len(ids), len(reference))
    return sum(a == b for a, b in zip(ids, reference, strict=False)) / longer if longer else 1.0


def agreed_start(ids: Sequence[int], reference: Sequence[int]) -> int:
    """Tokens before the first difference."""
    same = [a == b for a, b in zip(ids, reference, strict=False)]
    return same.index(False) if False in same else len(same)


def vector_agreement(vectors: Array, reference: Array) -> float:
    """Greedy matching of two texts' token vectors, [T, E] and [R, E], by cosine: F of the mean best match either way, -1..1.

    BERTScore's formula on the float model's own vectors. It is *not* BERTScore: other model, no rescaling, no published
    numbers to compare with.
    """
    if not len(vectors) or not len(reference):
        return float(len(vectors) == len(reference))
    cosine = _unit(vectors) @ _unit(reference).T
    precision, recall = float(cosine.max(axis=1).mean()), float(cosine.max(axis=0).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def _unit(vectors: Array) -> Array:
    unit: Array = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit
