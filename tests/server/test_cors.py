"""--allowed-origins: which web pages may read answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from engine.config.server_config import ServerConfig
from engine.errors import ConfigError
from engine.server.openapi_headers import READABLE
from helpers.http_server import Server

PAGE = "https://chat.example.com"
KEY = {"authorization": "Bearer key"}
CHAT = {"model": "default", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def listed(model_dir: Path) -> Iterator[Server]:
    config = ServerConfig(allowed_origins=(PAGE, "http://localhost:3000"), api_key=("key",))
    with Server(model_dir, config=config) as server:
        yield server


def preflight(server: Server, path: str, origin: str = PAGE, **headers: str) -> httpx.Response:
    asked = {"origin": origin, "access-control-request-method": "POST", **headers}
    return server.http.options(path, headers=asked)


def allowed_origin(response: httpx.Response) -> str | None:
    return response.headers.get("access-control-allow-origin")


def test_a_listed_page_may_read_every_kind_of_answer(listed: Server) -> None:
    for origin in (PAGE, "http://localhost:3000"):
        headers = {**KEY, "origin": origin}
        for response in (
            listed.get("/v1/models", headers=headers),
            listed.post("/v1/chat/completions", CHAT, headers=headers),
            listed.post("/v1/chat/completions", {**CHAT, "stream": True}, headers=headers),
            listed.post("/v1/chat/completions", {}, headers=headers),
            listed.get("/nowhere", headers=headers),
            listed.get("/v1/models", headers={"origin": origin}),  # 401
        ):
            assert allowed_origin(response) == origin
            assert response.headers["vary"] == "origin"
            exposed = response.headers["access-control-expose-headers"]
            assert set(exposed.split(", ")) == set(READABLE) >= {"retry-after", "x-request-id", "x-seed"}
            assert "access-control-allow-credentials" not in response.headers


@pytest.mark.parametrize(
    "origin",
    ["https://example.com", f"{PAGE}.evil.org", f"{PAGE}:8443", "http://chat.example.com", "null", "*", ""],
)
def test_other_pages_may_not(listed: Server, origin: str) -> None:
    response = listed.get("/v1/models", headers={**KEY, "origin": origin})
    assert (response.status_code, allowed_origin(response)) == (200, None)
    response = preflight(listed, "/v1/models", origin)
    assert response.status_code == 204
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_preflights_need_no_key_and_open_nothing_else(listed: Server) -> None:
    wanted = "authorization, content-type, x-stainless-lang"
    response = preflight(listed, "/v1/chat/completions", **{"access-control-request-headers": wanted})
    assert response.status_code == 204
    assert response.content == b""
    assert allowed_origin(response) == PAGE
    assert response.headers["access-control-allow-methods"] == "POST"
    assert response.headers["access-control-allow-headers"] == wanted
    assert preflight(listed, "/v1/models/org/name").headers["access-control-allow-methods"] == "GET, HEAD"
    assert preflight(listed, "/flush_cache").headers["access-control-allow-methods"] == "GET, POST"
    assert preflight(listed, "/nowhere").status_code == 404
    assert listed.http.options("/v1/models").status_code == 401  # no question of a browser
    for method in ("GET", "POST", "DELETE"):
        asked = {"origin": PAGE, "access-control-request-method": method}
        assert listed.http.request(method, "/v1/models", headers=asked).status_code == 401


@pytest.mark.parametrize("wanted", ["a\tb", "a;b", "a: b", "ü".encode(), ",", "a,,b"])
def test_strange_header_names_are_not_sent_back(listed: Server, wanted: str | bytes) -> None:
    response = preflight(listed, "/v1/models", **{"access-control-request-headers": wanted})
    assert response.status_code == 204
    assert "access-control-allow-headers" not in response.headers


def test_all_pages(model_dir: Path) -> None:
    with Server(model_dir, config=ServerConfig(allowed_origins=("*",))) as server:
        for origin in (PAGE, "null"):
            assert allowed_origin(server.get("/v1/models", headers={"origin": origin})) == "*"
            assert (
                preflight(server, "/v1/models", origin).headers["access-control-allow-methods"] == "GET, HEAD"
            )


def test_by_default_no_page_may(server: Server) -> None:
    response = server.get("/v1/models", headers={"origin": PAGE})
    assert allowed_origin(response) is None and "vary" not in response.headers
    assert preflight(server, "/v1/models").status_code == 405


@pytest.mark.parametrize(
    "origin",
    [
        "",
        "example.com",
        "https://example.com/",
        "https://",
        "https://Example.com",
        "https://a b",
        "https://*/",
    ],
)
def test_what_is_no_origin(origin: str) -> None:
    with pytest.raises(ConfigError, match="--allowed-origins"):
        ServerConfig(allowed_origins=(origin,))
