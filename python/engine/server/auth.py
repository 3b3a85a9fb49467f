"""Who may ask: API keys, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from sanic.request import Request

from engine.server.error_map import HttpError

OPEN_PATHS = frozenset({"/health", "/ready", "/metrics"})


class ApiKeys:
    """The accepted keys. Only digests are kept, so no key can reach a log or an answer."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(_digest(key) for key in keys)

    def check(self, request: Request) -> None:
        """Raises a 401 `HttpError` unless the request carries an accepted key or needs none."""
        if not self._digests or request.path in OPEN_PATHS:
            return
        key = _key_of(request)
        if key is None:
            raise _refusal("missing_api_key", "No API key given; send it as 'Authorization: Bearer KEY'.")
        digest = _digest(key)
        # All comparisons are made, so that the time taken does not tell which key was near.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            raise _refusal("invalid_api_key", "The API key is not valid.")


def _key_of(request: Request) -> str | None:
    scheme, _, token = request.headers.get("authorization", "").strip().partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return request.headers.get("x-api-key") or None


def _digest(key: str) -> bytes:
    # A header that is not UTF-8 arrives with surrogates: such bytes are a wrong key, not a crash.
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _refusal(slug: str, message: str) -> HttpError:
    return HttpError(401, "authentication_error", slug, message, headers={"www-authenticate": "Bearer"})
