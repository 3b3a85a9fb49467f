"""The headers that requests may have and answers get, for the description of the API."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from engine.server.openapi_words import INTEGER, TEXT, Schema
from engine.server.request_id import MAX_CHARS

_RATE_LIMITS = {
    f"x-ratelimit-{word}-{of}": f"{what} {of} of a minute, for an API key with such a limit."
    for word, what in (("limit", "All"), ("remaining", "What is left of the"), ("reset", "Time until all"))
    for of in ("requests", "tokens")
}
_CORS = {
    "access-control-allow-origin": "With --allowed-origins: the origin of a page that may read the answer.",
    "access-control-expose-headers": "With --allowed-origins: the headers that such a page may read.",
    "vary": "With --allowed-origins: the answer depends on who asks.",
}
_RETRY = {
    "retry-after": "Seconds after which it may go better.",
    "retry-after-ms": "The same in milliseconds.",
    "x-should-retry": "false where it will not go better.",
}
GENERATED = {
    "x-ignored-params": "Fields of the request that mean nothing here.",
    "x-seed": "The seeds drawn for a request without one, one for each of the first prompts.",
    "x-default-max-tokens": "The default that limited the answer, or may limit it.",
    "x-truncated-prompt-tokens": "How many tokens were cut from the prompts, if any were.",
    "server-timing": "Where the time went, with return_timings.",
}
STREAMED = {
    "cache-control": "Of a stream: no cache may keep it.",
    "x-accel-buffering": "Of a stream: no proxy may hold it back.",
}
_ALWAYS = {
    "x-request-id": "The request's own header of that name, or one made up for the log.",
    **_RATE_LIMITS,
    **_CORS,
}
_AUTHENTICATE = {"www-authenticate": "How a key is to be sent."}
_ALLOW = {"allow": "The methods of the path."}
_OF_STATUS = {401: _AUTHENTICATE, 405: _ALLOW, 429: _RETRY, 503: _RETRY}
_ALL = {**_ALWAYS, **GENERATED, **STREAMED, **_RETRY, **_AUTHENTICATE, **_ALLOW}
_COUNTS = {
    *("retry-after", "retry-after-ms", "x-default-max-tokens", "x-truncated-prompt-tokens"),
    *(name for name in _RATE_LIMITS if "-reset-" not in name),
}

READABLE = tuple(name for name in (*_ALWAYS, *GENERATED, *_RETRY) if name not in _CORS)
"""What web pages may read of an answer, as far as it has it."""

HEADERS: dict[str, Any] = {
    name: {"description": text, "schema": INTEGER if name in _COUNTS else TEXT} for name, text in _ALL.items()
}
"""Every header of answers that is not HTTP's own, by name."""

REQUEST_ID = "x-request-id"
PARAMETERS: dict[str, Any] = {
    REQUEST_ID: {
        "in": "header",
        "name": REQUEST_ID,
        "description": f"Name of the request in the log and in the answer: up to {MAX_CHARS} printable ASCII "
        "characters; anything else is replaced.",
        "schema": TEXT,
    }
}
"""The headers that every route reads, besides those with keys."""

SECURITY: dict[str, Schema] = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "Authorization: Bearer KEY, where the server has API keys.",
    },
    "x-api-key": {
        "type": "apiKey",
        "in": "header",
        "name": "x-api-key",
        "description": "The same, where there is no Authorization header with a key.",
    },
}


def of_answer(*names: str) -> dict[str, Schema]:
    """Those of an answer that may have `names` besides those of every answer."""
    return _refs((*_ALWAYS, *names))


def of_error(status: int) -> dict[str, Schema]:
    return _refs((*_ALWAYS, *_OF_STATUS.get(status, ())))


def _refs(names: Iterable[str]) -> dict[str, Schema]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}
