"""HEAD, methods that a route does not have, and parameters that a query should not have."""

from __future__ import annotations

import pytest

from engine.server.openapi import OPERATIONS
from helpers.http_server import Server

GET_PATHS = [o.path for o in OPERATIONS if o.method == "get" and o.path != "/flush_cache"]
POST_ONLY = [o.path for o in OPERATIONS if o.method == "post" and o.path != "/flush_cache"]
VARYING = {"/metrics", "/v1/loads", "/debug/state"}
"""Answers that differ from one to the next."""


@pytest.mark.parametrize("path", GET_PATHS)
def test_head_answers_as_get_without_a_body(server: Server, path: str) -> None:
    path = path.replace("{model_id}", "default")
    get, head = server.get(path), server.http.head(path)
    assert head.status_code == get.status_code == 200
    assert head.content == b""
    assert set(head.headers) == set(get.headers)
    assert head.headers["content-type"] == get.headers["content-type"]
    if path not in VARYING:
        assert head.headers["content-length"] == get.headers["content-length"]


def test_head_changes_nothing(server: Server) -> None:
    """The one GET that does something is there for SGLang's clients."""
    assert server.http.head("/flush_cache").status_code == 405


def test_head_of_a_refusal_is_that_refusal_without_a_body(server: Server) -> None:
    for path, status in (("/v1/models/nobody", 404), ("/nowhere", 404), ("/v1/loads?format=x", 400)):
        get, head = server.get(path), server.http.head(path)
        assert head.status_code == get.status_code == status
        assert head.content == b""
        assert head.headers["content-length"] == get.headers["content-length"]


def test_a_connection_goes_on_after_head(server: Server) -> None:
    first, last = "HEAD /health HTTP/1.1\r\nHost: x\r\n", "GET /version HTTP/1.1\r\nHost: x\r\n"
    head, _, rest = server.raw(f"{first}\r\n{last}Connection: close\r\n\r\n".encode()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert rest.startswith(b"HTTP/1.1 200 OK\r\n") and rest.endswith(b"}")


@pytest.mark.parametrize("path", POST_ONLY)
def test_other_methods_name_those_that_there_are(server: Server, path: str) -> None:
    for method in ("GET", "HEAD", "PUT", "PATCH", "DELETE"):
        response = server.http.request(method, path)
        assert response.status_code == 405
        assert response.headers["allow"] == "POST"
        if method != "HEAD":
            assert response.json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize("path", ["/health", "/v1/models/default"])
def test_routes_to_get_name_both_methods(server: Server, path: str) -> None:
    refusal = server.http.delete(path)
    assert refusal.status_code == 405
    assert set(refusal.headers["allow"].split(", ")) == {"GET", "HEAD"}


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/default", "/health", "/version", "/v1/loads"])
def test_unknown_query_parameters_of_get_routes_mean_nothing(server: Server, path: str) -> None:
    """Clients for Azure send api-version with everything, proxies and caches have their own."""
    assert server.get(path + "?api-version=2024-10-21&_=1&x").status_code == 200


def test_unknown_query_parameters_of_post_routes_mean_nothing(server: Server) -> None:
    body = {"model": "default", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
    plain = server.post("/v1/chat/completions", body)
    other = server.post("/v1/chat/completions?api-version=1&stream=true&max_tokens=1", body)
    assert other.status_code == 200
    assert other.json()["choices"] == plain.json()["choices"]
    assert "x-ignored-params" not in other.headers  # which is about fields
