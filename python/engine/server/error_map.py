"""Every refusal and failure as an HTTP status and one body that both kinds of client can read.

The body is flat (object, message, type, param, code as the status) and holds the same error once
more under `error`, as OpenAI's own clients expect it (code as a machine-readable slug), unless the
server is told to send one of the two only.
"""

from __future__ import annotations

import asyncio
import logging
import math
from typing import Any

import msgspec
from sanic.exceptions import RequestCancelled, SanicException

from engine.errors import ConfigError, EngineError, InvalidRequest, NotFound, Overloaded

logger = logging.getLogger(__name__)

INVALID = "invalid_request_error"
CLIENT_CLOSED = 499
"""As the status of an answer that nobody was there to take."""
MESSAGE_PREFIX = "Invalid request: "
_MAX_MESSAGE_CHARS = 300


class HttpError(Exception):
    """A refusal or failure, ready to be sent."""

    def __init__(
        self,
        status: int,
        kind: str,
        slug: str,
        message: str,
        *,
        param: str | None = None,
        headers: dict[str, str] | None = None,
        beside: dict[str, Any] | None = None,
    ) -> None:
        """`beside`: further fields of the body, where clients of a route know its refusals by them."""
        super().__init__(message)
        self.beside = beside or {}
        self.status = status
        self.kind = kind
        self.slug = slug
        self.message = message
        self.param = param
        self.headers = headers or {}

    def body(self, error_format: str) -> bytes:
        """The JSON body, also used as the error event of a stream. `error_format`: flat, openai or both."""
        common: dict[str, Any] = {
            "object": "error",
            "message": self.message,
            "type": self.kind,
            "param": self.param,
        }
        flat, nested = {**common, "code": self.status}, {"error": {**common, "code": self.slug}}
        shapes = {"flat": flat, "openai": nested, "both": flat | nested}
        return msgspec.json.encode(shapes[error_format] | self.beside)


def to_http(error: BaseException, request_id: str) -> HttpError:
    """What to answer for `error`; logs what only the operator may know.

    `request_id` is named in answers to failures, so that a report leads to the log.
    """
    if isinstance(error, HttpError):
        return error
    if isinstance(error, InvalidRequest):
        message = error.message
        if not message.startswith(MESSAGE_PREFIX):
            message = MESSAGE_PREFIX + message
        return HttpError(400, INVALID, error.slug, message, param=error.param)
    if isinstance(error, NotFound):
        return HttpError(404, INVALID, error.slug, error.message, param=error.param)
    if isinstance(error, Overloaded):
        return _overloaded(error)
    if isinstance(error, RequestCancelled):  # nobody reads this; for the log and the metrics
        return HttpError(CLIENT_CLOSED, INVALID, "client_closed", "The client closed the connection.")
    if isinstance(error, asyncio.CancelledError):  # soon the server is gone
        return _overloaded(Overloaded("The connection was closed.", slug="shutting_down"))
    if isinstance(error, SanicException):
        return _from_sanic(error, request_id)
    if isinstance(error, EngineError) and not isinstance(error, ConfigError):
        logger.error("request %s failed: %s", request_id, error.message)
    else:
        logger.error("request %s failed", request_id, exc_info=error)
    return _internal(request_id)


def _internal(request_id: str) -> HttpError:
    message = f"Internal server error; the server's log tells more about request {request_id}."
    return HttpError(500, "internal_error", "internal_error", message)


def _overloaded(error: Overloaded) -> HttpError:
    wait_s = max(1.0, error.retry_after_s)
    headers = {"retry-after": str(math.ceil(wait_s)), "retry-after-ms": str(math.ceil(wait_s * 1000))}
    if error.slug in ("shutting_down", "request_timeout"):  # here it will not go better
        headers["x-should-retry"] = "false"
    return HttpError(503, "overloaded_error", error.slug, error.message, headers=headers)


_STATUS_SLUGS = {
    400: "invalid_http",
    404: "route_not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "body_too_large",
    415: "unsupported_media_type",
    417: "expectation_failed",
}


def _from_sanic(error: SanicException, request_id: str) -> HttpError:
    status = error.status_code or 500
    if status >= 500:
        logger.error("request %s failed in the HTTP layer: %s", request_id, error)
        return _internal(request_id)
    kind = "not_found_error" if status == 404 else INVALID
    headers = {name.lower(): str(value) for name, value in (error.headers or {}).items()}
    headers.pop("content-length", None)
    message = str(error)[:_MAX_MESSAGE_CHARS]  # the framework repeats the client's path, however long
    return HttpError(status, kind, _STATUS_SLUGS.get(status, "invalid_http"), message, headers=headers)
