"""The autotuner with clocks and candidates under our control: fastest wins, ties go by order, a choice is measured once."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from anybit.kernels import autotune


class Bench:
    """Candidates that advance a fake clock by a set time and count their calls."""

    def __init__(self, **seconds: float) -> None:
        self.now, self.calls, self.seconds = 0.0, dict.fromkeys(seconds, 0), seconds
        self.candidates = {name: self.candidate(name) for name in seconds}

    def candidate(self, name: str) -> Callable[[], None]:
        def run() -> None:
            self.calls[name] += 1
            # The first call of each is slow, as with cold caches, and every other later one is disturbed.
            slow = 100 if self.calls[name] == 1 else 3 if self.calls[name] % 2 else 1
            self.now += self.seconds[name] * slow

        return run

    def best(self, bits: str = "w2a8", tokens: int = 1, shape: tuple[int, int] = (64, 64)) -> str:
        return autotune.best(self.candidates, shape, bits, tokens, clock=lambda: self.now)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ANYBIT_CACHE", str(tmp_path))
    return tmp_path / "autotune.json"


def test_the_fastest_wins_wherever_it_stands():
    assert Bench(a=3, b=1, c=2).best() == "b"
    assert Bench(c=2, b=3, a=1).best("w3a8") == "a"


def test_within_five_per_cent_the_first_wins():
    assert Bench(first=1.04, second=1.0).best() == "first"
    assert Bench(second=1.0, first=1.04).best() == "second"
    assert Bench(first=1.06, second=1.0).best("w3a8") == "second"


def test_measured_once_per_question(cache):
    bench = Bench(a=2, b=1)
    assert bench.best() == "b"
    calls = dict(bench.calls)
    assert bench.best() == "b"
    assert bench.best(tokens=1) == "b"
    assert bench.calls == calls
    reversed_now = Bench(a=1, b=2)  # another process finds the same answer without measuring
    assert reversed_now.best() == "b"
    assert reversed_now.calls == {"a": 0, "b": 0}
    for question in ({"bits": "w4a8"}, {"tokens": 8}, {"shape": (64, 65)}):
        assert reversed_now.best(**question) == "a", question
    assert Bench(a=1, b=2, c=3).best() == "a"  # another choice of candidates
    assert len(next(iter(json.loads(cache.read_text()).values()))) == 5


def test_another_processor_or_version_measures_again(monkeypatch):
    assert Bench(a=2, b=1).best() == "b"
    monkeypatch.setattr(autotune.anybit, "__version__", "99")
    assert Bench(a=1, b=2).best() == "a"
    monkeypatch.undo()


def test_token_counts_share_buckets():
    assert [autotune.bucket(m) for m in (0, 1, 2, 3, 4, 5, 8, 33, 64, 65, 4096)] == [
        1,
        1,
        2,
        4,
        4,
        8,
        8,
        64,
        64,
        64,
        64,
    ]


@pytest.mark.parametrize("content", ["{", "[1]", '{"x": 3}', ""])
def test_a_broken_cache_is_measured_again_and_replaced(cache, content):
    cache.write_text(content)
    assert Bench(a=2, b=1).best() == "b"
    assert "b" in cache.read_text()


def test_no_candidates_is_an_error():
    with pytest.raises(ValueError, match="at least one candidate"):
        autotune.best({}, (1, 1), "w1a1", 1)
