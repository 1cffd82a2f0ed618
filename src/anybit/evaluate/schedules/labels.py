"""From which step on may the precision fall without the text getting worse? The labels of a learned schedule.

The high-precision run is made once; at every switch point its cache is kept, the low-precision branch runs to its end, and the
cache is taken back (methods/pmpd.md 2.4). A switch point h is h high-precision decode steps, here and at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from anybit.calibration.progress import Progress, silent
from anybit.engine.lanes import Lanes
from anybit.engine.schedulers.head import Array
from anybit.engine.schedulers.static import PARTS, grid
from anybit.evaluate.agreement import rouge_l
from anybit.evaluate.schedules.batch import Batch, chunks

RULE = "smallest i with round(rouge(high), 3) <= round(rouge(switch at i * L // N), 3), else N; no stemming"


@dataclass(frozen=True)
class Labelled:
    """A prompt and what its texts were worth.

    Attributes:
        features: keys and values of the last layer, averaged over heads, float32 [T, D] each.
        scores: ROUGE-L of the text that switched at each point 0..N-1 (None: the high run had ended before), and last of
            the one that never did.
        label: class 0..N.
        head_count: kv heads that the features are averages of.
    """

    features: tuple[Array, Array]
    scores: tuple[float | None, ...]
    label: int
    head_count: int


def label_of(scores: Sequence[float | None]) -> int:
    """The earliest switch that is no worse than never switching; `scores` end with that of never switching."""
    *forks, never = scores
    assert never is not None
    fine = (i for i, score in enumerate(forks) if score is not None and round(never, 3) <= round(score, 3))
    return next(fine, len(forks))


def forked_texts(
    batch: Batch, pair: tuple[int, int], points: Sequence[int], limit: int
) -> list[list[list[int] | None]]:
    """For each prompt of a fresh batch its texts when switching at each point, and last when never.

    Args:
        pair: high and low precision.
        points: ascending, below `limit`.

    Returns:
        [prompts][points + 1]; None for a fork after the high run had ended.
    """
    high, low = pair
    texts: list[list[list[int] | None]] = [[] for _ in batch.texts]
    for point in points:
        batch.advance(point, high)
        over = [batch.ended(lane) and batch.step > 0 for lane in range(len(batch.texts))]
        mark = batch.mark()
        batch.advance(limit, low)
        for lane, text in enumerate(batch.texts):
            texts[lane].append(None if over[lane] else list(text))
        batch.rewind(mark)
    batch.advance(limit, high)
    for lane, text in enumerate(batch.texts):
        texts[lane].append(list(text))
    return texts


def label_prompts(
    lanes: Lanes,
    prompts: Sequence[Sequence[int]],
    references: Sequence[str],
    *,
    pair: tuple[int, int],
    prefill: int,
    limit: int,
    decode: Callable[[Sequence[int]], str],
    progress: Progress = silent,
) -> list[Labelled]:
    """Label prompts for one pair of precisions.

    Args:
        references: the float model's texts.
        prefill: precision that prompts are read at, in training as at run time.
        limit: most new tokens L.
        decode: token ids to text.
    """
    found: dict[int, Labelled] = {}
    for group in chunks(prompts, lanes.count):
        batch = Batch(lanes, [prompts[at] for at in group], prefill, limit)
        caches = [lanes.last_keys_values(lane) for lane in range(len(group))]
        texts = forked_texts(batch, pair, grid(limit, PARTS)[:-1], limit)
        for lane, at in enumerate(group):
            scores = tuple(
                None if text is None else rouge_l(decode(text), references[at], stemmed=False) for text in texts[lane]
            )
            keys, values = caches[lane]
            features = keys.mean(axis=0), values.mean(axis=0)
            found[at] = Labelled(features, scores, label_of(scores), len(keys))
        progress(f"labels {pair[0]} to {pair[1]} bits", len(found), len(prompts))
    return [found[at] for at in range(len(prompts))]
