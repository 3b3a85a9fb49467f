"""Answers that are one JSON value."""

from __future__ import annotations

from typing import Any

import msgspec
from sanic import HTTPResponse


def json_response(content: Any, headers: dict[str, str] | None = None, status: int = 200) -> HTTPResponse:
    body = msgspec.json.encode(content)
    return HTTPResponse(body, status, headers, "application/json")
