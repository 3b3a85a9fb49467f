"""What is counted and timed for /metrics. Each server has its own; names carry the prefix engine:.

Labels take few values, all of them ours: nothing that a client makes up becomes one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import monotonic

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import Metric

from engine.server.histogram import Histogram, histogram_family
from engine.server.token_tally import BOUNDS_S, TokenTally

PREFIX = "engine:"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_TOKENS = tuple(2**i for i in range(18))
_STAGES = ("queue", "prefill", "decode")
_LONG_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The counters and histograms of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._histograms: list[tuple[str, str, str | None, dict[str, Histogram]]] = []
        self._of_endpoint: dict[tuple[str, str], tuple[Counter, Gauge]] = {}
        self._responses_of: dict[tuple[str, str, int], Counter] = {}
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of admitted requests.")
        self.cached_tokens = self._counter("cached_tokens", "Prompt tokens taken from the prefix cache.")
        self.requests = self._counter("num_requests", "Requests admitted.")
        self.aborted = self._counter("num_aborted_requests", "Requests ended by their client, or aborted.")
        self.ignored_fields = self._counter("ignored_fields", "Unknown fields of requests.")
        self._rejected = self._counter("rejected", "Requests refused, by the code of the error.", "reason")
        self._cancelled = self._counter("cancelled", "Requests ended before their end, by cause.", "cause")
        self._responses = self._counter(
            "http_responses", "Answers over HTTP.", "endpoint", "method", "status_code"
        )
        self._http_requests = self._counter("http_requests", "Requests over HTTP.", "endpoint", "method")
        self._http_active = Gauge(
            PREFIX + "http_requests_active",
            "Requests over HTTP that are not answered to the end.",
            ("endpoint", "method"),
            registry=self._registry,
        )
        self.structured = self._counter("num_so_requests", "Requests admitted with a constraint.")
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From the request's submission to its first token.", _LONG_S
        )
        self.tokens = TokenTally(PREFIX)
        self.e2e_latency = self._histogram(
            "e2e_request_latency_seconds", "From the request's submission to its last token.", _LONG_S
        )
        self.queue_time = self._histogram(
            "queue_time_seconds", "From the request's submission to its admission.", _LONG_S
        )
        self.prompt_lens = self._histogram(
            "prompt_tokens_histogram", "Tokens of the prompts of a request.", _TOKENS
        )
        self.uncached_prompt_lens = self._histogram(
            "uncached_prompt_tokens_histogram", "Tokens of the prompts of a request, computed anew.", _TOKENS
        )
        self.time_per_token = self._histogram(
            "request_time_per_output_token_seconds",
            "From a request's first token to its last, divided by the tokens of a choice after the first.",
            BOUNDS_S,
        )
        self._stages = {stage: Histogram(_LONG_S) for stage in _STAGES}
        text = "Of complete requests: until admission, from there to the first token, from there to the last."
        name = PREFIX + "per_stage_req_latency_seconds"
        self._histograms.append((name, text, "stage", self._stages))
        self.answer_lens = self._histogram(
            "generation_tokens_histogram", "Tokens generated for a request, complete or not.", _TOKENS
        )

    def begin_request(self, endpoint: str, method: str) -> Callable[[], None]:
        """Count a request over HTTP; what is returned is called when it is over."""
        labels = endpoint, _known(method)
        if labels not in self._of_endpoint:  # looked up by the library, they cost more than counting
            self._of_endpoint[labels] = self._http_requests.labels(*labels), self._http_active.labels(*labels)
        requests, active = self._of_endpoint[labels]
        requests.inc()
        active.inc()
        return active.dec

    def count_response(self, endpoint: str, method: str, status: int) -> None:
        """`endpoint` is the path of a route, with names in place of its parameters."""
        labels = endpoint, _known(method), status
        if labels not in self._responses_of:
            self._responses_of[labels] = self._responses.labels(endpoint, _known(method), str(status))
        self._responses_of[labels].inc()

    def count_cancellation(self, cause: str) -> None:
        """One that ended before its end: by its client, an abort, or the code of an error."""
        self._cancelled.labels(cause).inc()
        if cause in ("client", "abort"):
            self.aborted.inc()

    def observe_stages(self, **seconds: float) -> None:
        """How long the parts of a complete request took."""
        for stage, value in seconds.items():
            self._stages[stage].observe(value)

    def count_rejection(self, reason: str) -> None:
        self._rejected.labels(reason).inc()

    def collect(self) -> Iterable[Metric]:
        yield from self._registry.collect()
        yield from (histogram_family(*described) for described in self._histograms)
        yield from self.tokens.collect()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
        histogram = Histogram(bounds)
        self._histograms.append((PREFIX + name, text, None, {"": histogram}))
        return histogram


def _known(method: str) -> str:
    return method if method in _METHODS else "other"


class RequestTimer:
    """Times and counts one request from its submission on. Choices are told apart by any number."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._tally = metrics, metrics.tokens
        self._start_s = monotonic()
        self._admitted_s = self._first_token_s = self._start_s
        self._last_token_s: dict[int, float] = {}
        self._prompt_tokens = 0

    def admitted(self, prompt_tokens: int) -> None:
        self._admitted_s = monotonic()
        self._metrics.queue_time.observe(self._admitted_s - self._start_s)
        self._metrics.requests.inc()
        self._metrics.prompt_tokens.inc(prompt_tokens)
        self._metrics.prompt_lens.observe(prompt_tokens)
        self._prompt_tokens = prompt_tokens

    def tokens(self, choice: int, num_tokens: int) -> None:
        """New tokens of a choice arrived together."""
        if not num_tokens:
            return
        now = monotonic()
        last_s = self._last_token_s.get(choice)
        if last_s is not None:
            self._tally.add_after(num_tokens, now - last_s)
        else:
            if not self._last_token_s:
                self._first_token_s = now
                self._metrics.time_to_first_token.observe(now - self._start_s)
            self._tally.add(num_tokens)
        self._last_token_s[choice] = now

    @property
    def timings(self) -> dict[str, float]:
        """Milliseconds until admission, from there to the first token, and from there to the last one.

        `ttft_ms` and `total_ms` go from the submission to the first and to the last token. Without
        a token the present takes the place of both.
        """
        first_s = self._first_token_s if self._last_token_s else monotonic()
        last_s = max(self._last_token_s.values(), default=first_s)
        seconds = {
            "queue_ms": self._admitted_s - self._start_s,
            "prefill_ms": first_s - self._admitted_s,
            "decode_ms": last_s - first_s,
            "ttft_ms": first_s - self._start_s,
            "total_ms": last_s - self._start_s,
        }
        return {name: round(value * 1000, 3) for name, value in seconds.items()}

    def ended(
        self, cached_tokens: int, num_tokens: int | None, *, is_complete: bool, cause: str | None
    ) -> None:
        """The admitted request is over, after `num_tokens`, or None where no token was asked for; `cause`
        says why before its end, if it was."""
        self._metrics.cached_tokens.inc(cached_tokens)
        self._metrics.uncached_prompt_lens.observe(self._prompt_tokens - cached_tokens)
        if num_tokens is not None:
            self._metrics.answer_lens.observe(num_tokens)
        if is_complete:
            self._metrics.e2e_latency.observe(monotonic() - self._start_s)
            self._observe_parts(num_tokens or 0)
        if cause is not None:
            self._metrics.count_cancellation(cause)

    def _observe_parts(self, num_tokens: int) -> None:
        num_choices = len(self._last_token_s)
        if not num_choices:
            return
        decode_s = max(self._last_token_s.values()) - self._first_token_s
        self._metrics.observe_stages(
            queue=self._admitted_s - self._start_s,
            prefill=self._first_token_s - self._admitted_s,
            decode=decode_s,
        )
        if num_tokens > num_choices:
            self._metrics.time_per_token.observe(decode_s * num_choices / (num_tokens - num_choices))
