"""Answers that are one JSON value."""

from __future__ import annotations

from typing import Any

import msgspec
from sanic import HTTPResponse


def json_response(content: Any, headers: dict[str, str] | None = None) -> HTTPResponse:
    return HTTPResponse(msgspec.json.encode(content), headers=headers, content_type="application/json")
