"""Forked texts, labels and the way back."""

from __future__ import annotations

import itertools

import pytest

from anybit.engine.schedulers.confidence import ConfidenceSchedule
from anybit.engine.schedulers.static import candidates, grid, static
from anybit.errors import InputError
from anybit.evaluate.schedules.batch import Batch, bits_of, run_fixed, run_scheduled
from anybit.evaluate.schedules.labels import forked_texts, label_of, label_prompts
from stub_lanes import END, ScriptedLanes, tiny_lanes

PROMPTS = [[5, 6, 7], [40, 41], [9] * 6, [100, 3, 50, 60]]


def test_labels_by_hand() -> None:
    """Four prompts; a word is a number, and the float model says 4 5 6 7. In prompt [k] the low precision says 9 instead of the
    tokens 1..k-1, and is right from token k on. Switch points 0, 1, 2 of L = 4: token t + 1 is made by decode step t."""

    def script(tokens: list[int], widths: list[int]) -> int:
        made, low = len(tokens) - 1, widths[-1] == 3
        return 9 if low and made < tokens[0] else made + 4

    def decode(ids) -> str:
        return " ".join(map(str, ids))

    lanes = ScriptedLanes(script)
    found = label_prompts(lanes, [[3], [1], [2], [9]], ["4 5 6 7"] * 4, pair=(4, 3), prefill=4, limit=4, decode=decode)
    assert [one.label for one in found] == [2, 0, 1, 3]
    assert found[0].scores == pytest.approx((0.5, 0.75, 1.0, 1.0))  # 4 9 9 7, 4 5 9 7, 4 5 6 7
    assert found[1].scores == pytest.approx((1.0, 1.0, 1.0, 1.0))
    assert found[3].scores == pytest.approx((0.25, 0.5, 0.75, 1.0))  # 4 9 9 9, ...
    assert found[0].features[0].tolist() == [[3, 4]]
    assert found[0].head_count == 2


def test_label_rule() -> None:
    assert label_of([0.5, 0.6, 0.7, 0.6]) == 1
    assert label_of([0.5, 0.5, 0.5, 0.6]) == 3
    assert label_of([0.59996, 0.6, 0.6, 0.6]) == 0  # equal to three digits
    assert label_of([0.5, None, None, 0.6]) == 3  # the high run had ended: those forks never were


def test_a_fork_after_the_end_is_no_fork() -> None:
    lanes = ScriptedLanes(lambda tokens, widths: END if len(tokens) == 5 else 7)
    texts = forked_texts(Batch(lanes, [[1, 2]], 4, 9), (4, 3), grid(9)[:-1], 9)
    assert texts == [[[7, 7, 7, END], None, None, [7, 7, 7, END]]]


def test_forks_read_the_cache_of_the_high_run() -> None:
    """The widths that each text saw are the high run's up to the fork: a re-read prompt would see others."""
    seen = []

    def script(tokens: list[int], widths: list[int]) -> int:
        seen.append(tuple(widths))
        return 7

    forked_texts(Batch(ScriptedLanes(script), [[1, 2]], 4, 6), (3, 2), (0, 2, 4), 6)
    ends = [widths for widths in seen if len(widths) == 7]
    assert ends == [(4, 4, 2, 2, 2, 2, 2), (4, 4, 3, 3, 2, 2, 2), (4, 4, 3, 3, 3, 3, 2), (4, 4, 3, 3, 3, 3, 3)]


@pytest.mark.parametrize("pair", [(4, 3), (4, 2), (3, 2)])
def test_forks_are_the_static_texts(pair: tuple[int, int]) -> None:
    """A fork at h is the text of the schedule with h high steps, token for token, whoever shares the batch."""
    lanes, limit = tiny_lanes(seed=3), 13
    texts = forked_texts(Batch(lanes, PROMPTS, 4, limit), pair, grid(limit)[:-1], limit)
    for at, h in enumerate(grid(limit)):
        for lane, prompt in enumerate(PROMPTS):
            alone = run_fixed(lanes, [prompt], static(pair, [h]), 4, limit)[0]
            assert texts[lane][at] in (None, alone)
    assert len({tuple(text) for text in texts[0] if text}) > 1  # the precisions do differ


def test_scheduled_one_by_one_equals_a_batch() -> None:
    lanes = tiny_lanes(seed=1)
    for schedule in candidates((4, 3, 2), 9):
        together = run_fixed(lanes, PROMPTS, schedule, 4, 9)
        for prompt, text in zip(PROMPTS, together, strict=True):
            alone, state = run_scheduled(lanes, prompt, schedule, 4, 9)
            assert alone == text
            assert bits_of(alone, state) == tuple(state.bits(t) for t in range(len(alone) - 1))


def test_confidence_runs_one_by_one() -> None:
    text, state = run_scheduled(tiny_lanes(seed=1), PROMPTS[0], ConfidenceSchedule((4, 3, 2), 2, 0.0), 4, 20)
    assert len(text) <= 20
    assert [bits for _, bits in state.switches] == [4, 3, 2][: len(state.switches)]
    assert len(state.switches) > 1


def test_rewind_is_exact() -> None:
    lanes = tiny_lanes(seed=2)
    batch = Batch(lanes, PROMPTS, 4, 30)
    batch.advance(5, 4)
    mark = batch.mark()
    first = []
    for bits in (4, 2, 3, 4):
        batch.advance(30, bits)
        first.append([list(text) for text in batch.texts])
        batch.rewind(mark)
        assert batch.step == 5
    assert first[0] == first[3]
    assert len({str(texts) for texts in first}) == 3
    assert all(a[lane][:6] == b[lane][:6] for a, b in itertools.pairwise(first) for lane in range(4))


def test_too_much_for_the_lanes() -> None:
    lanes = tiny_lanes(count=2)
    with pytest.raises(InputError, match="do not fit 2 lanes"):
        Batch(lanes, PROMPTS, 4, 5)
    with pytest.raises(InputError, match="exceed the model's context"):
        Batch(lanes, PROMPTS[:1], 4, 126)
