"""One line of JSON for every request that may cost something, also one that was refused; no content."""

from __future__ import annotations

import logging
import re
import time
from time import monotonic
from typing import Any

import msgspec
from sanic.request import Request

from engine.server.request_id import request_id_of

logger = logging.getLogger("engine.requests")


def endpoint_of(route: Any) -> str:
    """The path of Sanic's route, with {names} in place of its parameters; "other" for no route of ours."""
    if route is None:
        return "other"
    if not hasattr(route.ctx, "endpoint"):
        route.ctx.endpoint = "/" + re.sub(r"<(\w+)(:\w+)?>", r"{\1}", route.path)
    return route.ctx.endpoint


class RequestLog:
    """The line about one HTTP request. Kept with it, and written once."""

    def __init__(self, request: Request) -> None:
        self.started_s = monotonic()
        self.code: str | None = None
        """Of the error that was answered."""
        self.details: dict[str, Any] = {}
        self.is_later = False
        """Whether the answer goes on after its headers; who sends it writes the line."""
        self._request = request
        self._is_written = False

    def write(self, endpoint: str, status: int) -> None:
        request = self._request
        if self._is_written or request.method in ("GET", "HEAD", "OPTIONS"):
            return
        self._is_written = True
        if not logger.isEnabledFor(logging.INFO):
            return
        client = getattr(request.ctx, "client", None)
        line = {
            "time": round(time.time(), 3),
            "request_id": request_id_of(request),
            "endpoint": endpoint,
            "status": status,
            "code": self.code,
            "key": client.name if client is not None and client.name else None,
            "total_ms": round((monotonic() - self.started_s) * 1000, 3),
            **self.details,
        }
        text = msgspec.json.encode({k: v for k, v in line.items() if v is not None}).decode()
        # `info` would look for the line of code that calls it, which takes a third of all and is not shown.
        logger.handle(logger.makeRecord(logger.name, logging.INFO, "", 0, text, (), None))


def log_of(request: Request) -> RequestLog:
    """The same for a request at every call."""
    log = getattr(request.ctx, "log", None)
    if log is None:
        log = request.ctx.log = RequestLog(request)
    return log
