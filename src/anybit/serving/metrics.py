"""Counts for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from anybit.serving.batch.request import Stats

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
GAUGES = {
    "waiting": "Accepted requests without a slot",
    "running": "Requests with a slot",
    "pages_free": "Free pages of the key-value cache",
    "pages_total": "Pages of the key-value cache",
}
COUNTERS = {
    "passes": "Passes of the model",
    "preempted": "Requests that gave their pages away and read their text again",
    "prompt_tokens": "Prompt tokens read",
    "prefix_tokens": "Prompt tokens found in the cache",
    "generated_tokens": "Tokens generated",
    "drafted": "Guessed tokens checked",
    "accepted": "Guessed tokens that were right",
}


class Metrics:
    """A registry of its own, so that several servers can live in one process."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Engine(stats))
        self._first = self._histogram("first_token", "Request accepted until its first token")
        self._gap = self._histogram("token_gap", "Between two pieces of one stream")
        self._answers = Counter("anybit_answers", "HTTP answers", ["route", "status"], registry=self._registry)

    def _histogram(self, name: str, words: str) -> Histogram:
        return Histogram(f"anybit_{name}_seconds", words, registry=self._registry, buckets=_SECONDS)

    def piece(self, first: float | None, gap: float, tokens: int) -> None:
        """A stream brought `tokens` tokens: `first` seconds after it was asked, or `gap` after the last."""
        if tokens:
            self._gap.observe(gap) if first is None else self._first.observe(first)

    def answered(self, route: str, status: int) -> None:
        """An HTTP answer went out."""
        self._answers.labels(route, str(status)).inc()

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)


class _Engine:
    """The engine's own counts, read when asked for."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """One family for each count."""
        stats = self._stats()
        for name, words in GAUGES.items():
            yield GaugeMetricFamily(f"anybit_{name}", words, value=getattr(stats, name))
        for name, words in COUNTERS.items():
            yield CounterMetricFamily(f"anybit_{name}", words, value=getattr(stats, name))
        made = CounterMetricFamily("anybit_tokens_by_bits", "Tokens generated at each precision", labels=["bits"])
        for bits, tokens in sorted(stats.tokens_by_bits.items()):
            made.add_metric([str(bits)], tokens)
        yield made
