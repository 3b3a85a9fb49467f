"""Naming adapters over HTTP: by name, by path, by neither."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import openai
import pytest

from engine.config.server_config import ServerConfig
from engine.errors import ConfigError, InvalidRequest
from engine.server.adapter_paths import AdapterRoots
from engine.server.adapters import MAX_UNLOADED
from helpers.adapter_calls import BASE, INPUTS, digests, load, unload
from helpers.http_server import MODEL_PATH, Server, write_adapter


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model": "base"}, None),
        ({"model": BASE}, None),
        ({"model": "base", "lora_path": None}, None),
        ({"model": "base", "lora_path": ""}, None),
        ({"model": "first"}, "one"),
        ({"model": "base:first"}, "one"),
        ({"model": f"{BASE}:first"}, "one"),
        ({"model": "default:first"}, "one"),
        ({"model": f"{MODEL_PATH}:first"}, "one"),
        ({"model": "base", "lora_path": "first"}, "one"),
        ({"model": "base", "lora_path": "{root}/one"}, "one"),
        ({"model": "base", "lora_path": "{root}/deep/../one"}, "one"),
        ({"model": "base", "lora_path": "{root}/two"}, "two"),
        ({"model": "base", "lora_path": "two"}, "two"),
        ({"model": "base", "lora_path": "deep/er"}, "er"),
        ({"model": "base", "lora_path": "{outside}"}, "outside"),
        ({"model": "base:{outside}"}, "outside"),
        ({"model": "{outside}"}, "outside"),
        ({"model": "base:first", "lora_path": "{root}/two"}, "one"),
    ],
)
@pytest.mark.parametrize("route", INPUTS)
def test_ways_to_name_one(lora, root, outside, route, fields, expected):
    fields = {name: value and value.format(root=root, outside=outside) for name, value in fields.items()}
    response = lora.post(route, {**INPUTS[route], **fields})
    assert response.status_code == 200, response.text
    assert "x-ignored-params" not in response.headers
    assert response.json()["model"] == fields["model"]
    assert digests(lora) == [expected]
    assert all(adapter.num_live == 0 for adapter in lora.context.adapters)


def test_an_unknown_model_is_told_all_that_there_are(lora):
    message = lora.post("/v1/completions", {**INPUTS["/v1/completions"], "model": "x"}).json()["message"]
    names = [card["id"] for card in lora.get("/v1/models").json()["data"]]
    assert len(names) > 1
    assert message == f"The model 'x' does not exist; this server has {', '.join(map(repr, names))}."


def test_native_generate_takes_one(lora):
    assert lora.post("/generate", {"text": "Hi", "lora_path": "first"}).status_code == 200
    assert digests(lora) == ["one"]
    assert lora.post("/generate", {"text": "Hi", "lora_path": "none"}).status_code == 404


@pytest.mark.parametrize(
    ("fields", "status", "slug", "param"),
    [
        ({"model": "second"}, 404, "model_not_found", "model"),
        ({"model": "base:second"}, 404, "adapter_not_found", "model"),
        ({"model": "base:"}, 404, "adapter_not_found", "model"),
        ({"model": "other:first"}, 404, "model_not_found", "model"),
        ({"model": "base:base"}, 404, "adapter_not_found", "model"),
        ({"lora_path": "second"}, 404, "adapter_not_found", "lora_path"),
        ({"lora_path": "{root}/second"}, 404, "adapter_not_found", "lora_path"),
        ({"lora_path": "{root}"}, 404, "adapter_not_found", "lora_path"),
        ({"lora_path": "deep"}, 404, "adapter_not_found", "lora_path"),
        ({"lora_path": "/etc"}, 400, "invalid_value", "lora_path"),
        ({"lora_path": "/etc/passwd"}, 400, "invalid_value", "lora_path"),
        ({"lora_path": "/"}, 400, "invalid_value", "lora_path"),
        ({"lora_path": "../outside"}, 400, "invalid_value", "lora_path"),
        ({"lora_path": "{root}/../outside"}, 400, "invalid_value", "lora_path"),
        ({"lora_path": "one/../../outside"}, 400, "invalid_value", "lora_path"),
        ({"lora_path": "{outside}/"}, 400, "invalid_value", "lora_path"),
        ({"lora_path": "/dev/zero"}, 400, "invalid_value", "lora_path"),
        ({"lora_path": "x" * 300}, 404, "adapter_not_found", "lora_path"),
        ({"lora_path": "{root}/" + "x" * 300 + "/one"}, 404, "adapter_not_found", "lora_path"),
        ({"lora_path": "~root"}, 404, "adapter_not_found", "lora_path"),
        ({"lora_path": "a\0b"}, 400, "invalid_value", "lora_path"),
        ({"lora_path": "x" * 5000}, 400, "invalid_value", "lora_path"),
        ({"lora_path": 7}, 400, "invalid_value", "lora_path"),
        ({"lora_path": ["first"]}, 400, "invalid_value", "lora_path"),
    ],
)
@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/embeddings"])
def test_what_is_not_there_or_not_allowed(lora, root, outside, route, fields, status, slug, param):
    fields = {n: v.format(root=root, outside=outside) if isinstance(v, str) else v for n, v in fields.items()}
    num_loads = len(lora.engine.adapter_loads)
    response = lora.post(route, {**INPUTS[route], "model": "base", **fields})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["code"], error["param"]) == (slug, param)
    assert digests(lora) == [] and len(lora.engine.adapter_loads) == num_loads


ALL_INPUTS = {**INPUTS, "/generate": {"text": "Hi"}, "/tokenize": {"prompt": "Hi"}}


@pytest.fixture
def any_name(model_dir: Path, root: Path) -> Iterator[Server]:
    """As `lora`, but every other name is one of the model too."""
    config = ServerConfig(
        served_model_name=("base",),
        allow_any_model_name=True,
        lora_paths=(f"first={root}/one",),
        lora_dir=(str(root),),
    )
    with Server(model_dir, config=config) as server:
        server.run(server.context.adapters.load_first())
        yield server
        server.wait_idle()


@pytest.mark.parametrize("route", ALL_INPUTS)
def test_any_model_name_is_no_adapter_name(any_name, root, route):
    """What is not there is never answered by the base, whatever stands before it."""

    def status(model: str) -> int:
        response = any_name.post(route, {**ALL_INPUTS[route], "model": model})
        if response.status_code != 200:
            assert response.json()["error"]["code"] == "adapter_not_found", response.text
            assert response.json()["param"] == "model"
        return response.status_code

    assert load(any_name, "x:y", root / "two").status_code == 200
    for model in ("other:pirate", "base:pirate", "llama3:8b", "other:", "base:first:8b", "first:other"):
        assert status(model) == 404, model
    assert digests(any_name) == []
    found = {"gpt-9": None, "base": None, "first": "one", "base:first": "one", "gpt-9:first": "one"}
    found |= {"llama3:8b:first": "one", "org/m:x:y": "two"}
    assert [status(model) for model in found] == [200] * len(found)
    assert digests(any_name) == ([] if route == "/tokenize" else list(found.values()))
    for name in ("first", "x:y"):
        assert unload(any_name, name).status_code == 200
        for model in (name, f"base:{name}", f"gpt-9:{name}"):
            assert status(model) == 404, "the base does not answer for what has been unloaded either"
    assert load(any_name, "first", root / "two").status_code == 200
    assert status("first") == status("gpt-9:first") == 200


@pytest.mark.parametrize("route", ALL_INPUTS)
def test_any_model_name_with_a_tag_where_adapters_never_were(model_dir, route):
    with Server(model_dir, config=ServerConfig(allow_any_model_name=True)) as server:
        for model in ("llama3:8b", "gpt-9"):
            assert server.post(route, {**ALL_INPUTS[route], "model": model}).status_code == 200
        assert server.post(route, {**ALL_INPUTS[route], "model": f"{MODEL_PATH}:8b"}).status_code == 404


def test_names_of_adapters_that_were_are_remembered_within_bounds(any_name, root):
    registry = any_name.context.adapters
    for number in range(3):
        assert load(any_name, f"x{number}", root / "two").status_code == 200
    any_name.call(lambda: registry._unloaded.update(dict.fromkeys(map(str, range(MAX_UNLOADED)))))
    for number in range(3):
        assert unload(any_name, f"x{number}").status_code == 200
    assert any_name.call(lambda: len(registry._unloaded)) == MAX_UNLOADED
    assert any_name.chat(model="x2").status_code == 404


@pytest.mark.parametrize("implementation", ["native", "transformers"])
def test_a_model_that_takes_no_adapters_says_so(model_dir, root, implementation):
    with Server(model_dir, config=ServerConfig(lora_dir=(str(root),))) as server:
        server.engine.ready = msgspec.structs.replace(
            server.engine.ready, takes_adapters=False, implementation=implementation
        )
        assert server.get("/get_model_info").json()["lora"]["enabled"] is False
        for route in ("/v1/chat/completions", "/v1/completions", "/generate"):
            for path in (str(root / "one"), "one", "none", "/etc"):
                body = {**ALL_INPUTS[route], "model": "default", "lora_path": path}
                response = server.post(route, body)
                assert response.status_code == 400, response.text
                assert response.json()["error"]["code"] == "unsupported_parameter"
                assert ("transformers" in response.json()["message"]) == (implementation != "native")
        response = load(server, "x", root / "one")
        assert response.status_code == 400 and "takes no adapters" in response.json()["error_message"]
        assert server.engine.adapter_loads == [] and digests(server) == []
        with pytest.raises(InvalidRequest, match="takes no adapters"):
            server.run(server.context.adapters.load("x", str(root / "one")))


@pytest.fixture
def tricks(root: Path, outside: Path) -> None:
    """Links and files in the root that lead elsewhere or nowhere."""
    (root / "link").symlink_to(outside)
    (root / "inner").symlink_to(root / "two")
    (root / "loop").symlink_to(root / "loop")
    (root / "devices").symlink_to("/dev")
    (root / "file").write_text("x")
    (root / "bare").mkdir()
    for name, file, target in (
        ("weights", "adapter_model.safetensors", outside / "adapter_model.safetensors"),
        ("configuration", "adapter_config.json", outside / "adapter_config.json"),
        ("device", "adapter_model.safetensors", Path("/dev/zero")),
    ):
        path = write_adapter(root / name) / file
        path.unlink()
        path.symlink_to(target)
    for name, file in (("pipe", "adapter_config.json"), ("pipes", "adapter_model.safetensors")):
        path = write_adapter(root / name) / file
        path.unlink()
        os.mkfifo(path)


REFUSED = (
    "link", "devices", "weights", "configuration", "device", "pipe", "pipes", "..", "../outside",
    "one/../../outside", "link/../outside", "{root}/../outside", "{root}/link", "/", "/etc/passwd",
    "/dev/zero", "/dev", "{outside}/", "a\0b",
)  # fmt: skip
ABSENT = ("loop", "file", "bare", "deep", "nothing", "{root}", "{root}/bare", "{root}/one/../none")


@pytest.mark.parametrize("path", [*REFUSED, *ABSENT])
@pytest.mark.usefixtures("tricks")
def test_paths_that_lead_elsewhere_or_nowhere(lora, root, outside, path):
    status, code = (400, "invalid_value") if path in REFUSED else (404, "adapter_not_found")
    path = path.format(root=root, outside=outside)
    before, num_loads = lora.get("/v1/models").json(), len(lora.engine.adapter_loads)
    for route, inputs in INPUTS.items():
        response = lora.post(route, {**inputs, "model": "base", "lora_path": path})
        assert (response.status_code, response.json()["error"]["code"]) == (status, code), response.text
        assert response.json()["param"] == "lora_path"
    for route in ("/load_lora_adapter", "/v1/load_lora_adapter"):
        response = lora.post(route, {"lora_name": "x", "lora_path": path})
        assert (response.status_code, response.json()["error"]["code"]) == (400, code), response.text
        assert response.json()["success"] is False and "x" not in response.json()["loaded_adapters"]
    assert lora.get("/v1/models").json() == before
    assert digests(lora) == [] and len(lora.engine.adapter_loads) == num_loads


@pytest.mark.usefixtures("tricks")
def test_links_within_are_followed(lora, root):
    assert lora.chat(model="base", lora_path=str(root / "inner")).status_code == 200
    assert load(lora, "x", "inner").status_code == 200


@pytest.mark.usefixtures("tricks")
def test_paths_of_the_operator_may_lead_anywhere_but_to_odd_files(root, outside):
    paths = {name: str(root / name) for name in ("link", "weights", "device", "pipe", "pipes")}
    roots = AdapterRoots([], paths.values())
    for name in ("link", "weights"):
        assert roots.find(paths[name])[0] == str(outside if name == "link" else root / name)
    for name in ("device", "pipe", "pipes"):
        with pytest.raises(InvalidRequest, match="no regular file"):
            roots.find(paths[name])


def test_unusable_files_say_why(lora, root):
    write_adapter(root / "broken")
    response = lora.chat(model="base", lora_path="broken")
    assert response.status_code == 400
    assert (
        response.json()["error"]["code"] == "invalid_adapter"
        and "It is broken." in response.json()["message"]
    )


def test_models_lists_each_with_its_parent(lora, root, outside):
    assert lora.chat(model="base", lora_path="two").status_code == 200
    cards = {card["id"]: card for card in lora.get("/v1/models").json()["data"]}
    assert list(cards) == [BASE, "base", "first", str(outside), str(root / "two")]
    assert cards["first"]["root"] == f"{root}/one" and cards["first"]["parent"] == BASE
    assert cards["base"]["parent"] is None
    for name, card in cards.items():
        assert card["max_model_len"] == 2048
        for id_ in (name, name.replace("/", "%2F")):
            assert lora.get(f"/v1/models/{id_}").json() == card
    assert lora.get("/v1/models/base:first").json() == cards["first"]
    assert lora.get("/v1/models/base:none").status_code == 404
    assert lora.get("/get_model_info").json()["lora"]["adapters"] == [
        "first",
        str(outside),
        str(root / "two"),
    ]


def test_with_the_sdk(lora):
    client = lora.sdk()
    messages = [{"role": "user", "content": "Hi"}]
    client.chat.completions.create(model="base:first", messages=messages)
    client.chat.completions.create(model="base", messages=messages, extra_body={"lora_path": "first"})
    assert digests(lora) == ["one", "one"]
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="base", messages=messages, extra_body={"lora_path": "nope"})
    assert caught.value.code == "adapter_not_found"


@pytest.mark.parametrize(
    "text",
    ["", "=path", "name=", '{"lora_name": "a"}', '{"lora_path": "a"}', "{",
     '{"lora_name": 1, "lora_path": "p"}',
     '{"lora_name": "a", "lora_path": "p", "pinned": 1}', '{"lora_name": "a", "lora_path": "p", "x": 1}'],
)  # fmt: skip
def test_wrong_lora_paths_are_refused_by_name(text):
    with pytest.raises(ConfigError, match="--lora-paths"):
        ServerConfig(lora_paths=(text,))


def test_lora_paths_must_name_adapters_apart():
    with pytest.raises(ConfigError, match="same name"):
        ServerConfig(lora_paths=("a=x", '{"lora_name": "a", "lora_path": "y", "pinned": true}'))


def test_lora_dir_must_be_there(tmp_path):
    with pytest.raises(ConfigError, match="--lora-dir"):
        AdapterRoots([str(tmp_path / "none")], [])


def info_without_adapters(server: Server) -> None:
    """As when another model embeds than the one that generates."""
    assert server.context.embedding is not None
    info = msgspec.structs.replace(server.context.embedding.info, takes_adapters=False)
    server.context.embedding = dataclasses.replace(server.context.embedding, info=info)
    server.context.names.embedding = "org/embedder"


@pytest.mark.parametrize("route", ["/v1/embeddings", "/v1/rerank", "/v1/score"])
@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "first"}, 400, "model"),
        ({"model": "base:first"}, 400, "model"),
        ({"model": "org/embedder", "lora_path": "first"}, 400, "lora_path"),
        ({"model": "org/embedder:first"}, 404, "model"),
        ({"model": "org/embedder", "lora_path": ""}, 200, None),
    ],
)
def test_a_model_that_takes_none_does_not_answer_as_if_there_was_none(lora, route, fields, status, param):
    info_without_adapters(lora)
    response = lora.post(route, {**INPUTS[route], **fields})
    assert response.status_code == status, response.text
    if param is not None:
        assert response.json()["param"] == param and digests(lora) == []
