"""The id under which a request is logged and answered."""

from __future__ import annotations

import re
import secrets

from sanic.request import Request

HEADER = "x-request-id"
MAX_CHARS = 256
_HARMLESS = re.compile(rf"[ -~]{{1,{MAX_CHARS}}}")
"""Printable ASCII: nothing that ends a line of a header or of a log."""


def request_id_of(request: Request) -> str:
    """The client's own id if it is harmless, else a new one; the same at every call."""
    known = getattr(request.ctx, "request_id", None)
    if known is None:
        given = request.headers.get(HEADER, "")
        known = given if _HARMLESS.fullmatch(given) else f"req-{secrets.token_hex(16)}"
        request.ctx.request_id = known
    return known
