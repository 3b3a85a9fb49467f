"""POST /v1/embeddings in front of a scripted engine, whose vectors show the token ids that arrived."""

from __future__ import annotations

import base64
import threading
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from engine.errors import Overloaded
from helpers.http_server import DEADLINE_S, Server, sent_post, wait_until


def embed(server: Server, input: Any, **fields: Any) -> httpx.Response:
    return server.post("/v1/embeddings", {"model": "default", "input": input, **fields})


def vectors(response: httpx.Response) -> list[list[float]]:
    assert response.status_code == 200, response.text
    return [item["embedding"] for item in response.json()["data"]]


def shown(ids: list[int]) -> list[float]:
    """What the scripted engine makes of a text."""
    return ([float(len(ids)), *map(float, ids)] + [0.0] * 8)[:8]


def test_the_shape_of_an_answer(server: Server) -> None:
    response = embed(server, ["Hi", "Hello"], user="somebody")
    assert response.json() == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": i, "embedding": shown(server.ids(text))}
            for i, text in enumerate(["Hi", "Hello"])
        ],
        "model": "default",
        "usage": {"prompt_tokens": 7, "total_tokens": 7},
    }
    assert "x-ignored-params" not in response.headers
    assert embed(server, "Hi", model="org/tiny-model").json()["model"] == "org/tiny-model"


def test_all_shapes_of_input_are_the_same(server: Server) -> None:
    ids = server.ids("Hi")
    for value, count in (("Hi", 1), (["Hi"], 1), (ids, 1), ([ids], 1), (["Hi", ids, "Hi"], 3)):
        assert vectors(embed(server, value)) == [shown(ids)] * count


def test_base64_is_float(server: Server) -> None:
    texts = [f"text {i}" for i in range(100)]
    floats = vectors(embed(server, texts, encoding_format="float"))
    for text, number, encoded in zip(
        texts, floats, vectors(embed(server, texts, encoding_format="base64")), strict=True
    ):
        assert np.frombuffer(base64.b64decode(encoded), "<f4").tolist() == number == shown(server.ids(text))


def test_the_sdk_reads_it(server: Server) -> None:
    with server.sdk() as client:
        answer = client.embeddings.create(model="default", input=["Hello, world!", "SGLang is fast"])
        assert [item.index for item in answer.data] == [0, 1]
        assert [item.embedding for item in answer.data] == [
            shown(server.ids(text)) for text in ("Hello, world!", "SGLang is fast")
        ]
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == 27
        with pytest.raises(openai.BadRequestError):
            client.embeddings.create(model="default", input="")
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="nope", input="a")


def test_dimensions_cut_and_scale(server: Server) -> None:
    ids = server.ids("Hello")
    for dimensions in (1, 3, 7):
        (vector,) = vectors(embed(server, "Hello", dimensions=dimensions))
        whole = np.array(shown(ids)[:dimensions])
        assert np.allclose(vector, whole / np.linalg.norm(whole), atol=1e-6)
    assert vectors(embed(server, "Hello", dimensions=8)) == [shown(ids)]


def test_prompts_of_the_checkpoint(server: Server) -> None:
    assert vectors(embed(server, "Hi", prompt_name="query")) == [shown(server.ids("ask: Hi"))]
    response = embed(server, "Hi", prompt_name="nope")
    assert response.status_code == 400 and response.json()["param"] == "prompt_name"
    assert "it has query, x" in response.json()["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [[1], []]}, "input"),
        ({"input": 3}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({"input": [{"text": "a"}]}, "input"),
        ({"input": [True]}, "input"),
        ({"input": [[True]]}, "input"),
        ({"input": [1.5]}, "input"),
        ({"input": [[1], ["a"]]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": [257]}, "input"),
        ({"input": [2**70]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a" * 2049}, "input"),
        ({"input": [1] * 2049}, "input"),
        ({"input": "a" * (2048 * 512 + 1)}, "input"),
        ({"encoding_format": "bytes"}, "encoding_format"),
        ({"encoding_format": 3}, "encoding_format"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": -3}, "dimensions"),
        ({"dimensions": 9}, "dimensions"),
        ({"dimensions": "8"}, "dimensions"),
        ({"dimensions": 2.5}, "dimensions"),
        ({"prompt_name": 3}, "prompt_name"),
        ({"user": 3}, "user"),
        ({"rid": ""}, "rid"),
        ({"lora_path": 3}, "lora_path"),
        ({"model": None}, "model"),
        ({"model": 3}, "model"),
    ],
)
def test_refusals_name_the_field(server: Server, fields: dict[str, Any], param: str | None) -> None:
    response = server.post("/v1/embeddings", {"model": "default", "input": "a", **fields})
    assert response.status_code == 400, response.text[:300]
    assert response.json()["param"] == response.json()["error"]["param"] == param
    assert not server.engine.embedded


def test_too_long_has_its_own_code(server: Server) -> None:
    response = embed(server, ["a", "b" * 2049])
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert "input 1 (2049 tokens)" in response.json()["message"]
    assert vectors(embed(server, "b" * 2048))[0][0] == 2048


def test_unknown_fields_are_named(server: Server) -> None:
    assert embed(server, "a", dimension=3).headers["x-ignored-params"] == "dimension"


def test_refusals_of_the_engine(server: Server) -> None:
    server.engine.refuse_with = Overloaded("The request queue is full.", slug="queue_full")
    response = embed(server, "a")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "queue_full")
    assert "retry-after" in response.headers


def test_an_abort_ends_it(server: Server) -> None:
    server.call(server.engine.hold)
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(embed(server, "a", rid="mine")))
    thread.start()
    try:
        wait_until(lambda: bool(server.engine.embedded))
        assert server.post("/abort_request", {"rid": "mine"}).json()["aborted"] == 1
        thread.join(DEADLINE_S)
    finally:
        server.call(server.engine.release)
    assert answers[0].status_code == 400
    assert answers[0].json()["error"]["code"] == "request_aborted"


def test_a_vanished_client_is_cancelled(server: Server) -> None:
    server.call(server.engine.hold)
    try:
        with sent_post(server.url, "/v1/embeddings", {"model": "default", "input": "a"}):
            wait_until(lambda: bool(server.engine.embedded))
        wait_until(lambda: bool(server.engine.cancelled))
    finally:
        server.call(server.engine.release)


def test_a_model_that_does_not_embed_says_so(model_dir) -> None:
    with Server(model_dir, embeds=False) as server:
        response = embed(server, "a")
        assert response.status_code == 400
        assert "--pooling" in response.json()["message"]
        assert server.get("/get_model_info").json()["embedding"] is None


def test_model_info_tells_how(server: Server) -> None:
    assert server.get("/get_model_info").json()["embedding"] == {
        "model": "org/tiny-model",
        "dimensions": 8,
        "max_len": 2048,
        "pooling": "mean",
        "normalize": True,
        "matryoshka_dimensions": "any",
        "prompts": ["query", "x"],
        "default_prompt_name": None,
        "truncates": False,
        "takes_adapters": True,
    }
