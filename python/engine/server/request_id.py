"""The id under which a request is logged and answered."""

from __future__ import annotations

import re
import uuid

from sanic.request import Request

HEADER = "x-request-id"
_HARMLESS = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def request_id_of(request: Request) -> str:
    """The client's own id if it is harmless, else a new one; the same at every call."""
    known = getattr(request.ctx, "request_id", None)
    if known is None:
        given = request.headers.get(HEADER, "")
        known = given if _HARMLESS.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        request.ctx.request_id = known
    return known
