"""/openapi.json and /docs say what the server does, all of it and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.config.server_config import ServerConfig
from engine.errors import Overloaded
from engine.server import schema
from engine.server.app import create_app, endpoint_of
from engine.server.auth import ADMIN_PATHS, OPEN_PATHS
from engine.server.fields import Fields
from engine.server.openapi import OPERATIONS, document
from engine.server.openapi_headers import GENERATED
from engine.text.stop_strings import MAX_STOP_CHARS
from helpers.http_server import Server, write_adapter

MESSAGES = [{"role": "user", "content": "Hi"}]
REQUIRED = {
    "ChatRequest": ("/v1/chat/completions", {"model": "default", "messages": MESSAGES}),
    "CompletionRequest": ("/v1/completions", {"model": "default", "prompt": "Hi"}),
    "EmbeddingRequest": ("/v1/embeddings", {"model": "default", "input": "Hi"}),
    "RerankRequest": ("/v1/rerank", {"model": "default", "query": "a", "documents": ["b"]}),
    "ScoreRequest": ("/v1/score", {"model": "default", "text_1": "a", "text_2": "b"}),
    "TokenizeRequest": ("/tokenize", {"model": "default", "prompt": "Hi"}),
    "DetokenizeRequest": ("/detokenize", {"model": "default", "tokens": [1]}),
    "GenerateRequest": ("/generate", {"model": "default", "text": "Hi"}),
    "LoadAdapterRequest": ("/load_lora_adapter", {"lora_name": "a", "lora_path": "tiny"}),
    "UnloadAdapterRequest": ("/unload_lora_adapter", {"lora_name": "a"}),
    "AbortRequest": ("/abort_request", {"rid": "a"}),
}
EXCLUSIVE = {("TokenizeRequest", "messages"), ("GenerateRequest", "input_ids")}
"""Not together with what the request has already."""

THOUGHTS = ("reasoning_effort", "thinking_budget", "thinking_token_budget")
"""For models that have some."""

SCHEMAS = document()["components"]["schemas"]


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from references(item)


def fits(value: Any, wanted: dict[str, Any]) -> bool:
    """Whether a value is as a schema says; knows the words that ours use, and no others."""
    if "$ref" in wanted:
        return fits(value, SCHEMAS[wanted["$ref"].rsplit("/", 1)[1]])
    if "anyOf" in wanted:
        return any(fits(value, option) for option in wanted["anyOf"])
    kinds = {
        "string": str, "boolean": bool, "integer": int, "number": (int, float), "object": dict, "array": list,
        "null": type(None),
    }  # fmt: skip
    names = wanted["type"] if isinstance(wanted["type"], list) else [wanted["type"]]
    if not any(isinstance(value, kinds[n]) and (n == "boolean" or value is not True) for n in names):
        return False
    if "enum" in wanted and value not in wanted["enum"]:
        return False
    if isinstance(value, list):
        return all(fits(item, wanted["items"]) for item in value)
    if isinstance(value, dict):
        properties = wanted.get("properties", {})
        return all(name in value for name in wanted.get("required", ())) and all(
            fits(value[name], properties[name]) for name in value if name in properties
        )
    return True


def test_every_route_is_described_and_every_description_is_a_route(server: Server) -> None:
    routes = create_app(server.context).router.routes
    registered = {(endpoint_of(route), method.lower()) for route in routes for method in route.methods}
    heads = {(path, "get") for path, method in registered if method == "head"}
    assert heads == {(path, method) for path, method in registered if method == "get"} - {
        ("/flush_cache", "get")
    }
    registered -= {(path, "head") for path, _ in heads}  # said once, for all of them
    described = {(path, method) for path, item in document()["paths"].items() for method in item}
    assert described == registered
    assert len(described) == len(OPERATIONS)


def test_it_is_served_and_hangs_together(server: Server) -> None:
    served = server.get("/openapi.json").json()
    assert served == document()
    for reference in references(served):
        kind, name = reference.removeprefix("#/components/").split("/")
        assert name in served["components"][kind]
    ids = [item["operationId"] for path in served["paths"].values() for item in path.values()]
    assert len(set(ids)) == len(ids)
    for path, item in served["paths"].items():
        for operation in item.values():
            given = [p["name"] for p in operation["parameters"] if p.get("in") == "path"]
            assert given == re.findall(r"{(\w+)}", path)


@pytest.fixture(scope="module")
def guarded(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A key with hardly any requests, and another one that manages."""
    keys = tmp_path_factory.mktemp("keys") / "keys.toml"
    keys.write_text('[few]\nkey = "few"\nrequests_per_minute = 2\n')
    config = ServerConfig(api_key_file=str(keys), admin_api_key="boss")
    with Server(model_dir, config=config) as server:
        yield server


OF_HTTP = {"content-type", "content-length", "transfer-encoding", "connection"}


@pytest.fixture(scope="module")
def eager(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Every header that a flag can bring; one key for all that it needs, one that is soon used up."""
    keys = tmp_path_factory.mktemp("keys") / "keys.toml"
    limits = "requests_per_minute = {}\ntokens_per_minute = 100000\n"
    keys.write_text(f'[many]\nkey = "many"\n{limits.format(1000)}[few]\nkey = "few"\n{limits.format(1)}')
    config = ServerConfig(api_key_file=str(keys), admin_api_key="boss", allowed_origins=("http://a.example",))
    with Server(model_dir, config=config) as server:
        yield server


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: f"{o.method} {o.path}")
def test_headers_of_answers_are_described(eager: Server, operation: Any) -> None:
    path = operation.path.replace("{model_id}", "default")
    described = document()
    responses = operation.described()["responses"]
    good = REQUIRED[operation.request][1] if operation.request else None
    bodies = [good]
    if operation.events:
        more = {"max_tokens": 1, "return_timings": True, "truncate_prompt_tokens": 1, "no such field": 1}
        bodies += [{**good, **more}, {**good, **more, "stream": True, "max_tokens": None}, []]
    found: set[str] = set()
    for key, body in [
        *(("many", body) for body in bodies),
        ("boss", good),
        ("no", good),
        ("few", good),
        ("few", good),
    ]:
        headers = {"origin": "http://a.example", "authorization": f"Bearer {key}"}
        answer = eager.http.request(operation.method, path, json=body, headers=headers)
        response = responses[str(answer.status_code)]
        if "$ref" in response:
            response = described["components"]["responses"][response["$ref"].rsplit("/", 1)[1]]
        assert set(answer.headers) - OF_HTTP <= set(response["headers"]), answer.status_code
        for name, value in answer.headers.items():
            if name not in OF_HTTP:
                found.add(name)
                wanted = described["components"]["headers"][name]["schema"]
                assert fits(int(value) if wanted["type"] == "integer" else value, wanted), (name, value)
    assert {"x-request-id", "vary", "access-control-allow-origin"} <= found
    if operation.path not in OPEN_PATHS:
        assert "www-authenticate" in found
        if operation.path not in ADMIN_PATHS:
            assert "x-ratelimit-remaining-requests" in found
            assert operation.method == "get" or "retry-after" in found
    if operation.events and operation.path != "/generate":
        assert set(operation.headers) | {"cache-control", "x-accel-buffering"} <= found


def check_refusal(answer: httpx.Response, status: int) -> dict[str, Any]:
    described = document()["components"]["responses"][str(status)]
    assert answer.status_code == status
    assert set(answer.headers) - OF_HTTP <= set(described["headers"])
    assert answer.headers["content-type"] == "application/json"
    assert fits(answer.json(), SCHEMAS["Error"])
    return answer.json()["error"]


def test_methods_that_a_path_does_not_have_are_refused_as_described(server: Server) -> None:
    for path, item in document()["paths"].items():
        allowed = {method.upper() for method in item}
        allowed |= {"HEAD"} if "GET" in allowed and path != "/flush_cache" else set()
        for method in {"GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"} - allowed:
            answer = server.http.request(method, path.replace("{model_id}", "default"))
            assert check_refusal(answer, 405)["code"] == "method_not_allowed"
            assert set(answer.headers["allow"].split(", ")) == allowed


@pytest.mark.parametrize(
    "path", ["/nope", "/v1", "/v1/", "//health", "/v1/chat", "/V1/models", "/docs/x", "/%2e%2e"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS"])
def test_paths_that_are_not_described_are_refused_as_described(
    server: Server, method: str, path: str
) -> None:
    error = check_refusal(server.http.request(method, server.url + path), 404)
    assert (error["type"], error["code"]) == ("not_found_error", "route_not_found")


def test_an_overloaded_answer_has_the_headers_that_are_described(server: Server) -> None:
    described = set(document()["components"]["responses"]["503"]["headers"])
    for slug in ("queue_full", "shutting_down"):
        server.call(lambda slug=slug: setattr(server.engine, "refuse_with", Overloaded("no", slug=slug)))
        refused = server.chat()
        assert refused.status_code == 503
        assert {"retry-after", "retry-after-ms"} <= set(refused.headers) - OF_HTTP <= described
        assert ("x-should-retry" in refused.headers) == (slug == "shutting_down")


def test_keys_are_sent_in_the_ways_that_are_described(eager: Server) -> None:
    schemes = document()["components"]["securitySchemes"]
    assert schemes.keys() == {"bearer", "x-api-key"}
    headers = [
        {"authorization": "Bearer many"},
        {schemes["x-api-key"]["name"]: "many"},
    ]
    assert [eager.get("/v1/models", headers=h).status_code for h in (*headers, {})] == [200, 200, 401]
    assert document()["security"] == [{"bearer": []}, {"x-api-key": []}, {}]


def test_the_request_id_is_described(eager: Server) -> None:
    (parameter,) = document()["components"]["parameters"].values()
    assert (parameter["in"], parameter["name"]) == ("header", "x-request-id")
    for operation in OPERATIONS:
        assert {"$ref": "#/components/parameters/x-request-id"} in operation.described()["parameters"]
    given = eager.get("/health", headers={parameter["name"]: "mine"})
    assert given.headers["x-request-id"] == "mine"


@pytest.fixture(scope="module")
def shared_server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    adapters = tmp_path_factory.mktemp("adapters")
    write_adapter(adapters / "tiny")
    with Server(model_dir, config=ServerConfig(lora_dir=(str(adapters),))) as server:
        yield server


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: f"{o.method} {o.path}")
def test_answers_are_as_described(server: Server, operation: Any) -> None:
    path = operation.path.replace("{model_id}", "default")
    body = REQUIRED[operation.request][1] if operation.request else None
    load_adapter(server)
    response = server.http.request(operation.method, path, json=body)
    assert response.status_code == 200, response.text
    media_type = response.headers["content-type"].split(";")[0]
    content = operation.described()["responses"]["200"]["content"]
    assert media_type in content
    if media_type == "application/json":
        assert fits(response.json(), content[media_type]["schema"])
    if operation.request:
        refused = server.http.request(operation.method, path, content=b"[]")
        assert refused.status_code == 400 and "400" in operation.described()["responses"]
        assert fits(refused.json(), SCHEMAS["Error"])


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: f"{o.method} {o.path}")
def test_refusals_for_the_sake_of_a_key_are_described(guarded: Server, operation: Any) -> None:
    path = operation.path.replace("{model_id}", "default")
    described = operation.described()["responses"]
    found = set()
    for key in ("none", "few", "few", "few"):
        headers = {"authorization": f"Bearer {key}"}
        body = {} if operation.request else None
        response = guarded.http.request(operation.method, path, json=body, headers=headers)
        found.add(str(response.status_code))
    assert found - {"200"} <= set(described)
    assert {"401", "403", "429"} & set(described) == {"401", "403", "429"} & found


@pytest.mark.parametrize("name", REQUIRED)
def test_described_fields_are_known_and_take_null(server: Server, name: str) -> None:
    path, body = REQUIRED[name]
    nulls = {field: None for field in SCHEMAS[name]["properties"] if field not in body}
    load_adapter(server)
    response = server.post(path, {**body, **nulls})
    assert response.status_code == 200, response.text
    for field, wanted in SCHEMAS[name]["properties"].items():
        if field in body or (name, field) in EXCLUSIVE:
            continue
        response = server.post(path, {**body, field: example(wanted)})
        assert "x-ignored-params" not in response.headers, field
        needs_more = ("top_logprobs", "top_logprobs_num", "logprob_start_len", *THOUGHTS)
        expected = 404 if field == "lora_path" else 400 if field in needs_more else 200
        assert response.status_code == expected, field


def load_adapter(server: Server) -> None:
    """Have the adapter "a", for what names one."""
    assert server.post(*REQUIRED["LoadAdapterRequest"]).status_code == 200


def example(wanted: dict[str, Any]) -> Any:
    """A value that a schema allows."""
    for union in ("anyOf", "oneOf"):
        if union in wanted:
            return example(wanted[union][0])
    if "enum" in wanted:
        return wanted["enum"][0]
    kind = wanted["type"]
    if kind == "object":
        return {name: example(wanted["properties"][name]) for name in wanted.get("required", ())}
    if kind in ("integer", "number"):
        return max(1, wanted.get("minimum", 1))
    return {"string": "x", "boolean": True, "array": []}[kind]


@pytest.mark.parametrize("name", ["ChatRequest", "CompletionRequest"])
def test_every_field_that_is_read_is_described(
    server: Server, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = set()
    raw = Fields.raw

    def noting(fields: Fields, field: str) -> Any:
        if not fields._path:
            read.add(field)
        return raw(fields, field)

    has_any = Fields.has_any

    def noting_any(fields: Fields, names: Iterable[str]) -> bool:
        if not fields._path:
            read.update(names)
        return has_any(fields, names)

    monkeypatch.setattr(Fields, "raw", noting)
    monkeypatch.setattr(Fields, "has_any", noting_any)
    path, body = REQUIRED[name]
    assert server.post(path, body).status_code == 200
    refused = set(schema._NEUTRAL) | (set() if name == "ChatRequest" else set(schema._CHAT_ONLY))
    assert read - refused == set(SCHEMAS[name]["properties"])


@pytest.mark.parametrize("name", ["ChatRequest", "CompletionRequest"])
def test_described_bounds_are_those_in_force(server: Server, name: str) -> None:
    path, body = REQUIRED[name]
    for field, optional in SCHEMAS[name]["properties"].items():
        wanted = optional.get("anyOf", [optional])[0]
        beyond = []
        if "maximum" in wanted:
            beyond.append(wanted["maximum"] + 1)
        if "minimum" in wanted:
            beyond.append(wanted["minimum"] - 1)
        if "exclusiveMinimum" in wanted:
            beyond.append(wanted["exclusiveMinimum"])
        if "maxLength" in wanted:
            beyond.append("x" * (wanted["maxLength"] + 1))
        for value in beyond:
            response = server.post(path, {**body, "logprobs": name == "ChatRequest" or None, field: value})
            assert response.status_code == 400, (field, value)


def test_how_long_stop_strings_may_be_together_is_described(server: Server) -> None:
    described = SCHEMAS["CompletionRequest"]["properties"]["stop"]["anyOf"][0]["description"]
    assert f"at most {MAX_STOP_CHARS} characters" in described
    stops = ["x" * (MAX_STOP_CHARS - 10), "y" * 10]
    assert server.complete(stop=stops).status_code == 200
    refused = server.complete(stop=[*stops, "z"])
    assert (refused.status_code, refused.json()["param"]) == (400, "stop")


def test_the_page_lists_the_routes_and_needs_nothing_else(server: Server) -> None:
    response = server.get("/docs")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    for operation in OPERATIONS:
        assert f"{operation.method.upper()} {operation.path}</code>" in response.text
    assert "<script" not in response.text and "http" not in response.text


@pytest.mark.parametrize("name", ["ChatRequest", "CompletionRequest"])
def test_all_that_can_be_asked_of_an_answer_is_described(server: Server, name: str) -> None:
    path, body = REQUIRED[name]
    everything = {
        "return_timings": True,
        "return_token_ids": True,
        "return_cached_tokens_details": True,
        "truncate_prompt_tokens": 1,
        "logprobs": name == "ChatRequest" or 1,
        "unknown": 1,
    }
    server.set_reply("x" * 30)  # longer than the default limit
    response = server.post(path, {**body, **everything})
    content, schema = response.json(), SCHEMAS["ChatCompletion" if name == "ChatRequest" else "Completion"]
    assert fits(content, schema)
    assert set(content) == set(schema["properties"])
    assert set(content["choices"][0]) == set(schema["properties"]["choices"]["items"]["properties"])
    described = document()["paths"][path]["post"]["responses"]["200"]["headers"]
    assert set(GENERATED) <= set(response.headers) & set(described)
