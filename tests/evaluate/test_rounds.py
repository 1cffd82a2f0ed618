"""Taking turns, ratios and the busy check."""

from __future__ import annotations

import multiprocessing
import time

import pytest

from anybit.evaluate.rounds import busy_cores, ratios, spread, take_turns


def test_everybody_takes_turns_and_starts_in_turn() -> None:
    calls: list[str] = []
    measures = {name: (lambda n=name: calls.append(n) or len(calls)) for name in "abc"}
    results = take_turns(measures, 4, lambda *_: pytest.fail("nobody fails"), RuntimeError)
    assert "".join(calls) == "abcbcacababc"
    assert results == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}


def test_one_that_fails_is_out_and_the_others_go_on() -> None:
    turns = iter([1.0, 2.0])
    told: list[tuple[str, str]] = []

    def fails_later() -> float:
        for turn in turns:
            return turn
        raise RuntimeError("out of memory")

    measures = {"steady": lambda: 5.0, "late": fails_later}
    results = take_turns(measures, 5, lambda name, error: told.append((name, str(error))), RuntimeError)
    assert results == {"steady": [5.0] * 5}
    assert told == [("late", "out of memory")]


def test_other_errors_are_not_swallowed() -> None:
    def bug() -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        take_turns({"ours": bug}, 1, lambda *_: None, RuntimeError)


def test_ratios_cancel_what_a_whole_round_suffers() -> None:
    noise = [1.0, 0.2, 0.5, 0.9, 0.1]
    ratio = ratios([30 * n for n in noise], [20 * n for n in noise])
    assert ratio.median == ratio.low == ratio.high == pytest.approx(1.5)
    assert ratios([10.0, 1.0, 4.0], [1.0, 10.0, 2.0]).median == 2.0


def test_spread() -> None:
    measured = spread([3.0, 1.0, 2.0])
    assert (measured.median, measured.low, measured.high, measured.n) == (2.0, 1.0, 3.0, 3)


def _spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_busy_cores_sees_another_process() -> None:
    process = multiprocessing.get_context("fork").Process(target=_spin, args=(3.0,))
    process.start()
    try:
        busy = busy_cores(0.5)
    finally:
        process.kill()
        process.join()
    if busy is None:
        pytest.skip("this system has no /proc/stat")
    assert busy > 0.6
