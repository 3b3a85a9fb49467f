"""How many requests and tokens one client may have in a minute."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from engine.server.error_map import HttpError


class Allowance:
    """A bucket that holds what a minute allows and is refilled evenly."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._left = float(per_minute)
        self._at_s = clock()

    @property
    def left(self) -> float:
        now = self._clock()
        self._left = min(self.per_minute, self._left + (now - self._at_s) * self.per_minute / 60)
        self._at_s = now
        return self._left

    def wait_s(self, amount: float) -> float:
        """Seconds until `amount` can be taken; infinity if it never can."""
        if amount > self.per_minute:
            return math.inf
        return max(0.0, (amount - self.left) * 60 / self.per_minute)

    def take(self, amount: float) -> None:
        """Negative amounts are given back."""
        self._left = min(self.per_minute, self.left - amount)

    @property
    def reset_s(self) -> float:
        """Seconds until it is full."""
        return (self.per_minute - self.left) * 60 / self.per_minute


class RateLimits:
    """Those of one client. None: no limit."""

    def __init__(
        self,
        requests_per_minute: int | None,
        tokens_per_minute: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._requests = None if requests_per_minute is None else Allowance(requests_per_minute, clock)
        self._tokens = None if tokens_per_minute is None else Allowance(tokens_per_minute, clock)

    def take_request(self) -> None:
        """Raises a 429 `HttpError` when the minute's requests are used up."""
        _take(self._requests, 1, "requests")

    def take_tokens(self, num_tokens: int) -> None:
        """Take what a request may use at most; `give_back` what it did not.

        Raises a 429 `HttpError` when the minute's tokens do not allow it.
        """
        _take(self._tokens, num_tokens, "tokens")

    def give_back(self, num_tokens: int) -> None:
        if self._tokens is not None:
            self._tokens.take(-num_tokens)

    def headers(self) -> dict[str, str]:
        """What is left, as OpenAI's servers say it."""
        headers = {}
        for name, allowance in (("requests", self._requests), ("tokens", self._tokens)):
            if allowance is not None:
                headers[f"x-ratelimit-limit-{name}"] = str(allowance.per_minute)
                headers[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(allowance.left)))
                headers[f"x-ratelimit-reset-{name}"] = f"{allowance.reset_s:.3f}s"
        return headers


def _take(allowance: Allowance | None, amount: int, what: str) -> None:
    if allowance is None:
        return
    wait_s = allowance.wait_s(amount)
    if wait_s == 0:
        allowance.take(amount)
        return
    message = f"The limit of {allowance.per_minute} {what} per minute of this API key is reached."
    advice_s = min(wait_s, 60)
    headers = {"retry-after": str(math.ceil(advice_s)), "retry-after-ms": str(math.ceil(advice_s * 1000))}
    if wait_s == math.inf:
        message = (
            f"The request may use {amount} {what}, but this API key has {allowance.per_minute} per minute."
        )
        headers["x-should-retry"] = "false"
    raise HttpError(429, "rate_limit_error", "rate_limit_exceeded", message, headers=headers)
