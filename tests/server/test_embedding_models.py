"""Real servers with a real embedding model: as the only one, and beside the bundled chat model."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest

from engine import LLM
from helpers.adapters import make_adapter, save_adapter
from helpers.embedding_models import MINILM, make_model, pooling, write_modules
from helpers.http_server import DEADLINE_S, wait_until, write_model
from helpers.server_process import ServerProcess, run

TEXTS = ["A man is eating food.", "Someone eats a meal.", "The stock market fell today."]
NAME = str(MINILM)
CHAT = {"model": "default", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}


@pytest.fixture(scope="module")
def alone() -> Iterator[ServerProcess]:
    with ServerProcess(
        "--model-path", NAME, "--served-model-name", "minilm", "--watchdog-timeout", "0"
    ) as process:
        process.wait_ready()
        yield process
        assert process.stop() == 0
        assert "Traceback" not in process.log


@pytest.fixture(scope="module")
def beside() -> Iterator[ServerProcess]:
    with ServerProcess("--embedding-model", NAME, "--matryoshka-dimensions", "64,128") as process:
        process.wait_ready()
        yield process
        assert process.stop() == 0
        assert "Traceback" not in process.log


def vectors(client: openai.OpenAI, model: str, texts: list[str], **fields) -> np.ndarray:
    answer = client.embeddings.create(model=model, input=texts, **fields)
    assert [item.index for item in answer.data] == list(range(len(texts)))
    return np.array([item.embedding for item in answer.data])


def server_cards(server: ServerProcess) -> list[dict]:
    return server.http.get("/v1/models").json()["data"]


def test_vectors_mean_something(alone: ServerProcess) -> None:
    found = vectors(alone.sdk(), "minilm", TEXTS)
    assert found.shape == (3, 384)
    likeness = found @ found.T
    assert np.allclose(np.diag(likeness), 1, atol=1e-5)
    assert likeness[0, 1] > 0.5 > 0.2 > likeness[0, 2]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {"model": "default", "prompt": "Hi", "max_tokens": 4}),
        ("/generate", {"text": "Hi"}),
    ],
)
def test_an_embedding_model_does_not_chat_and_says_why(alone: ServerProcess, path: str, body: dict) -> None:
    response = httpx.post(alone.url + path, json=body, timeout=DEADLINE_S)
    assert response.status_code == 400
    assert "use /v1/embeddings" in response.json()["message"]
    assert response.json()["param"] == "model"


def test_what_an_embedding_server_says_of_itself(alone: ServerProcess) -> None:
    client = alone.sdk()
    assert [(model.id, model.max_model_len) for model in client.models.list()] == [("minilm", 256)]
    info = httpx.get(f"{alone.url}/get_model_info").json()
    assert info["is_generation"] is False and info["architectures"] == ["BertModel"]
    assert info["embedding"]["dimensions"] == 384 and info["embedding"]["pooling"] == "mean"
    for path in ("/health", "/ready", "/health_generate", "/server_info", "/v1/loads", "/metrics"):
        assert httpx.get(alone.url + path, timeout=DEADLINE_S).status_code == 200, path
    tokens = httpx.post(f"{alone.url}/tokenize", json={"prompt": "hello world"}).json()["tokens"]
    assert tokens == [101, 7592, 2088, 102]
    by_ids = client.embeddings.create(model="minilm", input=tokens, encoding_format="float")
    by_text = client.embeddings.create(model="minilm", input="hello world", encoding_format="float")
    assert by_ids.data[0].embedding == by_text.data[0].embedding


def test_too_long_and_too_many(alone: ServerProcess) -> None:
    client = alone.sdk()
    assert len(client.embeddings.create(model="minilm", input="a " * 254).data) == 1
    with pytest.raises(openai.BadRequestError, match=r"257 tokens.*256 tokens") as caught:
        client.embeddings.create(model="minilm", input="a " * 255)
    assert caught.value.body["code"] == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="at most 2048"):
        client.embeddings.create(model="minilm", input=["a"] * 2049)


def test_a_thousand_single_requests_are_one_another(alone: ServerProcess) -> None:
    """Many clients at once: everybody gets the vector of his own text, the same as alone, and texts of all of
    them share batches. The engine is stopped until a crowd has asked, so that no slow client counts."""
    texts = [f"text number {i} " + "word " * (i % 10) for i in range(1000)]
    together = vectors(alone.sdk(), "minilm", texts)

    def num_batches() -> int:
        return alone.http.get("/debug/state").json()["engine"]["embedding"]["num_batches"]

    def num_asking() -> float:
        text = alone.http.get("/metrics").text
        lines = [line for line in text.splitlines() if line.startswith("engine:http_requests_active{")]
        return sum(float(line.split()[-1]) for line in lines if "/v1/embeddings" in line)

    def ask(part: list[str]) -> list[np.ndarray]:
        """Each over a connection of its own; the SDK would take longer than the model."""
        with contextlib.ExitStack() as stack:
            port = httpx.URL(alone.url).port
            crowd = [http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S) for _ in part]
            engine = alone.engine
            engine.suspend()
            try:
                for connection, text in zip(crowd, part, strict=True):
                    stack.callback(connection.close)
                    body = {"model": "minilm", "input": text, "encoding_format": "base64"}
                    connection.request("POST", "/v1/embeddings", json.dumps(body))
                wait_until(lambda: num_asking() >= len(part))
            finally:
                engine.resume()
            answers = [json.loads(connection.getresponse().read()) for connection in crowd]
        return [np.frombuffer(base64.b64decode(a["data"][0]["embedding"]), np.float32) for a in answers]

    before = num_batches()
    single = [vector for i in range(0, 1000, 250) for vector in ask(texts[i : i + 250])]
    assert (np.array(single) == together).all()
    assert num_batches() - before <= 60  # slots for 64 make 16


def test_two_models_on_one_server(beside: ServerProcess, alone: ServerProcess) -> None:
    client = beside.sdk()
    assert {model.id: model.max_model_len for model in client.models.list()} == {
        "engine-demo": 2048,
        "pirate": 2048,
        "uppercase": 2048,
        NAME: 256,
    }
    assert client.models.retrieve(NAME).id == NAME
    for name in (NAME, "default"):
        assert (vectors(client, name, TEXTS) == vectors(alone.sdk(), "minilm", TEXTS)).all()
    answer = client.chat.completions.create(**{**CHAT, "model": "engine-demo"})
    assert answer.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="use /v1/embeddings"):
        client.chat.completions.create(**{**CHAT, "model": NAME})
    with pytest.raises(openai.BadRequestError, match="/v1/chat/completions"):
        vectors(client, "engine-demo", TEXTS)
    with pytest.raises(openai.NotFoundError):
        vectors(client, "nope", TEXTS)


def test_dimensions_are_cut_and_of_length_one(beside: ServerProcess) -> None:
    client = beside.sdk()
    whole = vectors(client, NAME, TEXTS)
    for dimensions in (64, 128):
        cut = vectors(client, NAME, TEXTS, dimensions=dimensions)
        expected = whole[:, :dimensions] / np.linalg.norm(whole[:, :dimensions], axis=1, keepdims=True)
        assert np.allclose(cut, expected, atol=1e-6)
    with pytest.raises(openai.BadRequestError, match="must be one of 64, 128, or 384"):
        vectors(client, NAME, TEXTS, dimensions=100)


def test_base64_and_float_are_the_same(beside: ServerProcess) -> None:
    body = {"model": NAME, "input": TEXTS}
    floats = httpx.post(f"{beside.url}/v1/embeddings", json=body).json()["data"]
    encoded = httpx.post(f"{beside.url}/v1/embeddings", json={**body, "encoding_format": "base64"}).json()[
        "data"
    ]
    for one, other in zip(floats, encoded, strict=True):
        assert np.frombuffer(base64.b64decode(other["embedding"]), "<f4").tolist() == one["embedding"]


def test_truncation_and_another_name_by_flags() -> None:
    with ServerProcess("--embedding-model", f"mini/lm={NAME}", "--allow-auto-truncate") as process:
        process.wait_ready()
        client = process.sdk()
        cut = vectors(client, "mini/lm", ["a " * 1000, "a " * 254])
        assert (cut[0] == cut[1]).all()
        listed = [model.id for model in client.models.list()]
        assert "mini/lm" in listed and NAME not in listed
        assert client.models.retrieve("mini/lm").id == client.models.retrieve(NAME).id == "mini/lm"
        cards = [*server_cards(process), client.models.retrieve("mini/lm").model_dump()]
        roots = {card["root"] for card in cards if card["id"] == "mini/lm"}
        assert roots == {NAME}, "its path, as a named model's that generates"
        for name in ("mini/lm", NAME, "default"):
            answer = client.embeddings.create(model=name, input="a")
            assert answer.model == name
        with pytest.raises(openai.BadRequestError, match="use /v1/embeddings"):
            client.completions.create(model="mini/lm", prompt="a")
        assert process.stop() == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--embedding-model", "/nowhere"), "no such model directory: /nowhere"),
        (("--model-path", NAME, "--pooling", "middle"), "--pooling"),
        (("--embedding-model", NAME, "--matryoshka-dimensions", "x"), "--matryoshka-dimensions must be"),
        (("--embedding-model", "=" + NAME), "--embedding-model expects PATH or NAME=PATH"),
        (("--embedding-model", "a="), "--embedding-model expects PATH or NAME=PATH"),
        (("--embedding-model", "default=" + NAME), "is a name of the model that generates"),
        (("--embedding-model", "a=" + NAME, "--served-model-name", "a"), "'a' is a --served-model-name"),
    ],
)
def test_wrong_flags_are_one_line(argv: tuple[str, ...], message: str) -> None:
    result = run(*argv, "--port", "0")
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and message in errors[0]
    assert "Traceback" not in result.stderr


def test_a_dead_engine_ends_requests_and_comes_back() -> None:
    with ServerProcess("--model-path", NAME) as process:
        process.wait_ready()
        engine = process.engine
        answers: list[httpx.Response] = []
        body = {"model": "default", "input": ["word " * 240] * 2000}
        thread = threading.Thread(
            target=lambda: answers.append(
                httpx.post(f"{process.url}/v1/embeddings", json=body, timeout=DEADLINE_S)
            )
        )
        thread.start()
        wait_until(lambda: engine.cpu_times().user > 3 or not thread.is_alive())  # it computes
        assert thread.is_alive()
        engine.kill()
        thread.join()
        assert answers[0].status_code == 503
        assert answers[0].json()["error"]["code"] == "engine_restarted"
        process.wait_ready()
        assert vectors(process.sdk(), "default", TEXTS).shape == (3, 384)
        assert process.stop() == 0


# --- adapters


def embed(server: ServerProcess, **fields) -> httpx.Response:
    return server.http.post("/v1/embeddings", json={"model": "default", "input": "hello", **fields})


def test_an_encoder_takes_no_adapters(alone: ServerProcess) -> None:
    info = alone.http.get("/get_model_info").json()
    assert info["lora"]["enabled"] is info["embedding"]["takes_adapters"] is False
    response = embed(alone, lora_path="pirate")
    assert response.status_code == 400 and response.json()["param"] == "lora_path"
    assert "takes no adapters" in response.json()["message"]


def test_adapters_of_the_chat_model_are_not_those_of_the_one_that_embeds(beside: ServerProcess) -> None:
    for fields in ({"model": "pirate"}, {"model": "engine-demo:pirate"}, {"lora_path": "pirate"}):
        response = embed(beside, **fields)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["code"] == "unsupported_parameter"
    assert beside.http.get("/get_model_info").json()["lora"]["enabled"] is True


def test_a_decoder_that_only_embeds_takes_adapters(tmp_path: Path) -> None:
    """One that was made, like most for embeddings, for the model without a head."""
    model = make_model("qwen3", vocab_size=257)
    base = write_model(tmp_path / "model")
    model.save_pretrained(base)
    write_modules(base, pooling("lasttoken"), ("Normalize", None))
    adapter = save_adapter(make_adapter(model, task_type="FEATURE_EXTRACTION"), tmp_path / "root" / "one")
    with LLM(str(base), num_threads=1) as llm:
        expected = llm.embed(["hello"] * 2, lora_path=[None, str(adapter)]).tolist()
    assert expected[0] != expected[1]
    flags = ["--lora-paths", f"one={adapter}", "--lora-dir", str(tmp_path / "root"), "--num-threads", "1"]
    with ServerProcess("--model-path", str(base), "--served-model-name", "base", *flags) as server:
        server.wait_ready()
        ways = [{"model": "one"}, {"model": "base:one"}, {"lora_path": "one"}, {"lora_path": str(adapter)}]
        for number, fields in [(0, {}), *((1, way) for way in ways)]:
            assert embed(server, **fields).json()["data"][0]["embedding"] == expected[number]
        assert (
            embed(server, lora_path="two").status_code == embed(server, model="base:two").status_code == 404
        )
        cards = server_cards(server)
        assert [(card["id"], card["parent"]) for card in cards] == [("base", None), ("one", "base")]
        unloaded = server.http.post("/unload_lora_adapter", json={"lora_name": "one"})
        assert unloaded.status_code == 200 and embed(server, model="one").status_code == 404
        assert server.stop() == 0
