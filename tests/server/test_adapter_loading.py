"""Adapters loaded and unloaded while others are served."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from engine.config.server_config import ServerConfig
from helpers.adapter_calls import INPUTS, load, unload
from helpers.http_server import DEADLINE_S, Server, sent_post, wait_until, write_adapter


def test_load_and_unload(lora, root):
    response = load(lora, "second", root / "two", pinned=True)
    assert response.status_code == 200
    assert response.json()["success"] and response.json()["error_message"] is None
    assert response.json()["loaded_adapters"]["second"] == str(root / "two")
    assert lora.engine.adapter_loads[-1] == (str(root / "two"), True)
    assert lora.chat(model="second").status_code == 200
    assert lora.call(lambda: lora.engine.submitted[-1].adapter.is_pinned)
    response = unload(lora, "second", "/v1/unload_lora_adapter")
    assert response.status_code == 200 and "second" not in response.json()["loaded_adapters"]
    assert lora.chat(model="second").status_code == 404
    assert len(lora.engine.adapter_unloads) == 1
    assert lora.post("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "two"}).status_code == 200


def test_a_load_whose_client_leaves_is_done_all_the_same(lora, root):
    """Or the engine would keep, pinned, what nobody can name."""
    lora.call(lora.engine.hold)
    body = {"lora_name": "left", "lora_path": "two", "pinned": True}
    with sent_post(lora.url, "/load_lora_adapter", body):
        wait_until(lambda: lora.engine.adapter_loads[-1] == (str(root / "two"), True))
    lora.call(lora.engine.release)
    wait_until(lambda: lora.get("/v1/models/left").status_code == 200)
    assert unload(lora, "left").status_code == 200
    wait_until(lambda: len(lora.call(lambda: lora.engine.adapter_unloads)) == 1)


def test_pinned_from_the_start(model_dir, root):
    source = json.dumps({"lora_name": "p", "lora_path": str(root / "one"), "pinned": True})
    with Server(model_dir, config=ServerConfig(lora_paths=(source,))) as server:
        server.run(server.context.adapters.load_first())
        assert server.engine.adapter_loads == [(str(root / "one"), True)]
        assert server.chat(model="p").status_code == 200
        assert server.call(lambda: server.engine.submitted[-1].adapter.is_pinned)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("x", "/etc"), ("x", "nothing"), ("x", "../outside"), ("base", "two"), ("default", "two"),
        ("", "two"), ("a\nb", "two"), ("x" * 300, "two"), ("x", "broken"),
    ],
)  # fmt: skip
def test_a_load_that_fails_changes_nothing(lora, root, name, path):
    write_adapter(root / "broken")
    before = lora.get("/v1/models").json()
    response = load(lora, name, path)
    assert response.status_code == 400
    assert response.json()["success"] is False and response.json()["error_message"]
    assert list(response.json()["loaded_adapters"])[0] == "first"
    assert lora.get("/v1/models").json() == before


def test_unloading_what_is_not_there(lora):
    response = unload(lora, "nothing")
    assert response.status_code == 400 and response.json()["success"] is False
    assert response.json()["error"]["code"] == "adapter_not_found"
    assert response.json()["error_message"] in response.json()["message"]


def test_two_names_of_one_content_and_a_name_with_new_content(lora, root):
    load(lora, "twin", root / "one")
    assert unload(lora, "first").status_code == 200
    assert lora.engine.adapter_unloads == [], "the other name still has it"
    (root / "one" / "adapter_model.safetensors").write_bytes(b"new")
    assert lora.chat(model="twin").status_code == 200
    assert load(lora, "twin", root / "one").status_code == 200
    assert lora.chat(model="twin").status_code == 200
    old, new = lora.call(lambda: [request.adapter.digest for request in lora.engine.submitted])
    assert old != new
    wait_until(lambda: lora.call(lambda: lora.engine.adapter_unloads) == [old])


def test_pins_follow_the_names_that_have_them(lora, root):
    """A place is pinned as long as one of the names of its contents is."""

    def unpins() -> int:
        return lora.call(lambda: len(lora.engine.adapter_unpins))

    load(lora, "a", root / "two", pinned=True)
    load(lora, "b", root / "two", pinned=True)
    load(lora, "c", root / "two")
    load(lora, "a", root / "two")
    assert unpins() == 0, "b is still pinned"
    assert unload(lora, "b").status_code == 200
    assert unpins() == 1
    load(lora, "a", root / "two", pinned=True)
    assert unpins() == 1
    load(lora, "a", root / "two", pinned=False)
    assert unpins() == 2
    load(lora, "a", root / "one", pinned=True)
    load(lora, "a", root / "two")
    assert unpins() == 3
    one, two = lora.call(lambda: (lora.engine.adapter_unpins[2], lora.engine.adapter_unpins[0]))
    assert one != two == lora.call(lambda: lora.engine.adapter_unpins[1])
    assert lora.chat(model="a").status_code == 200
    assert not lora.call(lambda: lora.engine.submitted[-1].adapter.is_pinned)


def test_a_directory_that_changes_is_read_again(lora, root):
    for content in (b"two", b"three"):
        (root / "two" / "adapter_model.safetensors").write_bytes(content)
        for _ in range(2):
            assert lora.chat(model="base", lora_path="two").status_code == 200
    used = lora.call(lambda: [request.adapter.digest for request in lora.engine.submitted])
    assert used[0] == used[1] != used[2] == used[3]
    assert [Path(directory).name for directory, _ in lora.engine.adapter_loads[2:]] == ["two", "two"]


def in_thread(call) -> tuple[threading.Thread, list]:
    results: list = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    return thread, results


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/embeddings"])
def test_unload_waits_for_running_requests(lora, route):
    lora.call(lora.engine.hold)
    asking, answers = in_thread(lambda: lora.post(route, {**INPUTS[route], "model": "first"}))
    wait_until(lambda: lora.call(lambda: len(lora.engine.running)) == 1)
    unloading, unloads = in_thread(lambda: unload(lora, "first"))
    wait_until(lambda: lora.get("/v1/models/first").status_code == 404)
    assert lora.chat(model="first").status_code == 404
    assert not unloads and lora.call(lambda: lora.engine.adapter_unloads) == []
    lora.call(lora.engine.release)
    asking.join(DEADLINE_S), unloading.join(DEADLINE_S)
    assert answers[0].status_code == 200 and unloads[0].status_code == 200
    assert len(lora.engine.adapter_unloads) == 1


def test_first_uses_at_once_read_it_once(lora):
    lora.call(lora.engine.hold)
    asking = [in_thread(lambda: lora.chat(model="base", lora_path="two")) for _ in range(5)]
    wait_until(lambda: lora.call(lambda: len(lora.engine.adapter_loads)) == 3)
    lora.call(lora.engine.release)
    for thread, results in asking:
        thread.join(DEADLINE_S)
        assert results[0].status_code == 200
    assert len(lora.engine.adapter_loads) == 3
    assert all(adapter.num_live == 0 for adapter in lora.context.adapters)


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/embeddings"])
def test_a_refused_request_lets_its_adapter_go(lora, route):
    lora.call(lora.engine.hold)
    thread, _ = in_thread(lambda: lora.chat(model="first", rid="taken"))
    wait_until(lambda: lora.call(lambda: len(lora.engine.running)) == 1)
    again = lora.post(route, {**INPUTS[route], "model": "first", "rid": "taken"})
    assert again.status_code == 400 and again.json()["param"] == "rid"
    lora.call(lora.engine.release)
    thread.join(DEADLINE_S)
    assert all(adapter.num_live == 0 for adapter in lora.context.adapters)
