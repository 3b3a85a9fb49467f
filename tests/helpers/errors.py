"""The one body that every refusal has."""

from __future__ import annotations

from typing import Any

import httpx


def check_error(response: httpx.Response, status: int, slug: str, param: str | None = None) -> dict[str, Any]:
    """The body of an error, after checking that it is whole and gives nothing away."""
    assert response.status_code == status, response.text[:500]
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    nested = body["error"]
    assert set(body) == {"object", "message", "type", "param", "code", "error"}
    assert set(nested) == {"object", "message", "type", "param", "code"}
    assert body["object"] == nested["object"] == "error"
    assert body["message"] == nested["message"] != ""
    assert body["type"] == nested["type"]
    assert body["param"] == nested["param"]
    assert (body["code"], nested["code"], body["param"]) == (status, slug, param), body["message"]
    assert len(response.content) < 3000, "an error does not give the request back"
    for secret in ("Traceback", "site-packages", "/engine/", "\n"):
        assert secret not in body["message"]
    return body
