"""Who asks: API keys, compared in constant time, and which of them manages the server."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from sanic.request import Request

from engine.config.api_keys import ApiKey
from engine.server.error_map import HttpError
from engine.server.rate_limits import RateLimits

OPEN_PATHS = frozenset({"/health", "/ready", "/metrics"})
ADMIN_PATHS = frozenset(
    {
        "/abort_request",
        "/debug/state",
        "/flush_cache",
        "/load_lora_adapter",
        "/unload_lora_adapter",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
    }
)
"""With an admin key these take no other; without one, any accepted key."""


class Client:
    """Who sends requests with one key, or with none. `limits` is None where nothing is limited."""

    def __init__(self, key: ApiKey | None = None, *, is_admin: bool = False) -> None:
        self.name = "" if key is None else key.name
        self.weight = 1.0 if key is None else key.weight
        self.is_admin = is_admin
        has_limits = key is not None and (key.requests_per_minute or key.tokens_per_minute)
        self.limits = (
            RateLimits(key.requests_per_minute, key.tokens_per_minute) if key and has_limits else None
        )


class Keyring:
    """The accepted keys. Only digests are kept, so no key can reach a log or an answer."""

    def __init__(self, keys: Iterable[ApiKey], admin_key: str | None = None) -> None:
        self._clients = [(_digest(key.key), Client(key)) for key in keys]
        self._is_open = not self._clients
        self._has_admin = admin_key is not None
        if admin_key is not None:
            admin = Client(ApiKey(name="admin", key=admin_key), is_admin=True)
            self._clients.insert(0, (_digest(admin_key), admin))
        self._anybody = Client()

    def client_of(self, request: Request) -> Client:
        """Who sent it. Raises an `HttpError`: 401 without an accepted key, 403 with one that may not."""
        needs_admin = self._has_admin and is_admin_path(request)
        if request.path in OPEN_PATHS or (self._is_open and not needs_admin):
            return self._anybody
        key = _key_of(request)
        if key is None:
            raise _refusal("missing_api_key", "No API key given; send it as 'Authorization: Bearer KEY'.")
        digest, found = _digest(key), None
        for (
            known,
            client,
        ) in self._clients:  # all of them, so that the time taken does not tell which was near
            if hmac.compare_digest(digest, known) and found is None:
                found = client
        if found is None:
            raise _refusal("invalid_api_key", "The API key is not valid.")
        if needs_admin and not found.is_admin:
            message = "This API key may not manage the server."
            raise HttpError(403, "permission_error", "admin_required", message)
        return found


def is_admin_path(request: Request) -> bool:
    return request.path.rstrip("/") in ADMIN_PATHS  # the router ignores a slash at the end


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
