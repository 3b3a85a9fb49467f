"""Histograms for /metrics as plain numbers: what is observed for every request must not cost a lock."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.utils import floatToGoString


class Histogram:
    """Counts values by the first of `bounds` that they do not exceed. For one event loop."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, *labels: str) -> None:
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        family.add_metric(labels, list(zip(bounds, accumulate(self._counts), strict=True)), self._sum)


def histogram_family(
    name: str, text: str, label: str | None, histograms: Mapping[str, Histogram]
) -> HistogramMetricFamily:
    """What is exported of histograms by the value of `label`; without one, of the only one, under ""."""
    family = HistogramMetricFamily(name, text, labels=None if label is None else [label])
    for value, histogram in histograms.items():
        histogram.add_to(family, *([] if label is None else [value]))
    return family
