"""GET /, /version, /server_info, /v1/loads, /ready and /health_generate."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

import engine
from engine.config.server_config import ServerConfig
from engine.core.client import EngineState
from engine.core.messages import EngineStats
from engine.errors import Overloaded
from engine.server import load
from engine.server.routes import health
from helpers.http_server import Server, wait_until


def test_the_root_leads_to_routes_that_exist(server: Server) -> None:
    body = server.get("/").json()
    assert (body["name"], body["version"], body["status"]) == ("engine", engine.__version__, "ready")
    for link in body["links"].values():
        assert server.get(link).status_code in (200, 405), link


def test_version(server: Server) -> None:
    assert server.get("/version").json() == {"version": engine.__version__}


def test_server_info_has_configuration_and_capacity_and_no_secret(model_dir: Path) -> None:
    with Server(model_dir, config=ServerConfig(api_key=("hidden-key",), port=0)) as server:
        headers = {"authorization": "Bearer hidden-key"}
        response = server.get("/server_info", headers=headers)
        info = response.json()
        assert "hidden-key" not in response.text
        assert info == server.get("/get_server_info", headers=headers).json()
        assert info.items() >= server.get("/model_info", headers=headers).json().items()
        for path in ("/", "/version", "/server_info", "/get_server_info", "/v1/loads", "/health_generate"):
            assert server.get(path).status_code == 401, path
        assert server.get("/ready").status_code == 200
    assert (info["needs_api_key"], info["port"], info["state"]) == (True, server.port, "ready")
    assert info["max_total_num_tokens"] == 8192
    assert info["load"]["num_running_reqs"] == 0


def test_loads(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    idle = server.engine.stats

    async def busy() -> EngineStats:
        changed = {
            "num_running": 3,
            "num_waiting": 4,
            "num_preemptions": 2,
            "num_blocks_in_use": 128,
            "num_blocks_free": 384,
        }
        tokens = {"prompt_tokens_computed": 300, "prompt_tokens_cached": 100, "tokens_evicted": 5}
        return msgspec.structs.replace(await idle(), **changed, **tokens)

    monkeypatch.setattr(server.engine, "stats", busy)
    body = server.get("/v1/loads?format=json").json()
    expected = {
        "num_running_reqs": 3,
        "num_waiting_reqs": 4,
        "num_total_reqs": 7,
        "num_used_tokens": 128 * 16,
        "max_total_num_tokens": 512 * 16,
        "token_usage": 0.25,
        "cache_hit_rate": 0.25,
        "num_preemptions": 2,
        "num_free_tokens": 384 * 16,
        "num_cached_tokens": 0,
        "num_evicted_tokens": 5,
    }
    assert body["aggregate"].items() >= expected.items()
    assert body["loads"] == [{"dp_rank": 0, **body["aggregate"]}]
    assert abs(body["timestamp"] - time.time()) < 60
    refused = server.get("/v1/loads?format=xml")
    assert (refused.status_code, refused.json()["param"]) == (400, "format")


def test_loads_for_prometheus(server: Server) -> None:
    response = server.get("/v1/loads?format=prometheus")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    assert families["engine:max_total_num_tokens"].samples[0].value == 8192
    assert families["engine:num_running_reqs"].samples[0].value == 0
    assert "engine:num_requests" not in families, "only the load"
    accept = {"accept": "application/openmetrics-text"}
    assert server.get("/v1/loads?format=prometheus", headers=accept).text.endswith("# EOF\n")


def test_an_engine_that_does_not_answer_holds_nobody_up(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never() -> EngineStats:
        return await server.loop.create_future()

    monkeypatch.setattr(server.engine, "stats", never)
    monkeypatch.setattr(load, "STATS_TIMEOUT_S", 0.05)
    for path in ("/v1/loads", "/server_info"):
        response = server.get(path)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "queue_timeout")


@pytest.mark.parametrize(
    ("state", "slug"),
    [(EngineState.LOADING, "model_loading"), (EngineState.RESTARTING, "engine_restarted")],
)
def test_what_an_engine_that_is_not_ready_answers(server: Server, state: EngineState, slug: str) -> None:
    server.call(lambda: server.engine.set_state(state, "not now"))
    try:
        for path in ("/ready", "/health_generate", "/v1/loads", "/server_info"):
            response = server.get(path)
            assert (response.status_code, response.json()["error"]["code"]) == (503, slug), path
        assert server.get("/").json()["status"] == slug
        assert server.get("/version").status_code == 200
    finally:
        server.call(lambda: server.engine.set_state(EngineState.READY))
    assert server.get("/ready").json() == {"status": "ready"}


def test_health_generate_computes_one_token(server: Server) -> None:
    response = server.get("/health_generate")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})
    (request,) = server.engine.submitted
    assert (request.prompt_ids.tolist(), request.params.max_tokens, request.n) == ([0], 1, 1)


def test_health_generate_gives_up_and_frees_what_it_asked_for(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "GENERATE_TIMEOUT_S", 0.05)
    server.call(server.engine.hold)
    try:
        response = server.get("/health_generate")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "queue_timeout")
        wait_until(lambda: not server.call(lambda: server.engine.running))
        assert server.engine.cancelled == [server.engine.submitted[0].request_id]
    finally:
        server.call(server.engine.release)


def test_health_generate_says_what_refuses_requests(server: Server) -> None:
    server.engine.refuse_with = Overloaded("The queue is full.", retry_after_s=7)
    response = server.get("/health_generate")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "queue_full")
    assert response.headers["retry-after"] == "7"
    assert server.get("/ready").status_code == 200
