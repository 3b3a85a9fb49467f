"""What is counted for every token, for /metrics: plain numbers, because a token must not cost a lock."""

from __future__ import annotations

from collections.abc import Iterator
from time import monotonic

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from engine.server.histogram import Histogram, histogram_family

BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5)
_LEAST_RATED_S = 1.0
"""Over less a rate says nothing; and two who look in turns should not take it from each other."""


class TokenTally:
    """Tokens, and the times between two of a choice. For one event loop.

    `prefix` stands before the names of its metrics.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._num_tokens = 0
        self._gaps_s = Histogram(BOUNDS_S)
        self._marked = 0, monotonic()
        self._rate = 0.0

    def add(self, num_tokens: int) -> None:
        """The first tokens of a choice arrived."""
        self._num_tokens += num_tokens

    def add_after(self, num_tokens: int, seconds: float) -> None:
        """More tokens of a choice arrived, so long after the ones before them."""
        self._num_tokens += num_tokens
        self._gaps_s.observe(seconds / num_tokens)

    def throughput(self) -> float:
        """Tokens a second since this was last asked, or since the time before when that was just now."""
        num_tokens, since_s = self._marked
        passed_s = monotonic() - since_s
        if passed_s >= _LEAST_RATED_S:
            self._rate = (self._num_tokens - num_tokens) / passed_s
            self._marked = self._num_tokens, since_s + passed_s
        return self._rate

    def collect(self) -> Iterator[Metric]:
        name, text = self._prefix + "generation_tokens", "Tokens generated."
        yield CounterMetricFamily(name, text, value=self._num_tokens)
        name, text = self._prefix + "gen_throughput", "Tokens generated in a second, since the last look."
        yield GaugeMetricFamily(name, text, value=self.throughput())
        name, text = self._prefix + "inter_token_latency_seconds", "Between two tokens of a choice."
        yield histogram_family(name, text, None, {"": self._gaps_s})
