"""What is counted for every token, for /metrics: plain numbers, because a token must not cost a lock."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5)


class TokenTally:
    """Tokens, and the times between two of a choice. For one event loop.

    `prefix` stands before the names of its metrics.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._num_tokens = 0
        self._num_gaps = [0] * (len(_BOUNDS_S) + 1)  # by the first bound that a gap does not exceed
        self._gaps_s = 0.0

    def add(self, num_tokens: int) -> None:
        """The first tokens of a choice arrived."""
        self._num_tokens += num_tokens

    def add_after(self, num_tokens: int, seconds: float) -> None:
        """More tokens of a choice arrived, so long after the ones before them."""
        self._num_tokens += num_tokens
        self._num_gaps[bisect_left(_BOUNDS_S, seconds / num_tokens)] += 1
        self._gaps_s += seconds / num_tokens

    def collect(self) -> Iterator[Metric]:
        name, text = self._prefix + "generation_tokens", "Tokens generated."
        yield CounterMetricFamily(name, text, value=self._num_tokens)
        name, text = self._prefix + "inter_token_latency_seconds", "Between two tokens of a choice."
        bounds = [*map(floatToGoString, _BOUNDS_S), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._num_gaps), strict=True))
        yield HistogramMetricFamily(name, text, buckets=buckets, sum_value=self._gaps_s)
