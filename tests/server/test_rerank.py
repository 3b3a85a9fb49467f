"""POST /v1/rerank and /v1/score: with an embedding model by cosines, with a cross-encoder by pairs."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from helpers.embedding_models import MINILM, make_model
from helpers.http_server import DEADLINE_S, Server
from helpers.server_process import ServerProcess


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A random cross-encoder with a real tokenizer."""
    directory = tmp_path_factory.mktemp("ranker")
    model = make_model("bert", "ForSequenceClassification", num_labels=1, vocab_size=30522)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MINILM / name, directory)
    with ServerProcess("--model-path", str(directory), "--served-model-name", "ranker") as process:
        process.wait_ready()
        yield process
        assert process.stop() == 0
        assert "Traceback" not in process.log


def post(server: ServerProcess, path: str, **body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json={"model": "ranker", **body}, timeout=DEADLINE_S)


def test_a_cross_encoder_ranks(ranker: ServerProcess) -> None:
    documents = ["one fish", "two fish", "red fish", "blue fish"]
    answer = post(ranker, "/v1/rerank", query="which fish?", documents=documents).json()
    assert answer["model"] == "ranker" and answer["usage"]["total_tokens"] > 0
    found = {item["index"]: item["relevance_score"] for item in answer["results"]}
    assert sorted(found) == [0, 1, 2, 3]
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert all(item["document"]["text"] == documents[item["index"]] for item in answer["results"])
    scores = post(ranker, "/v1/score", text_1="which fish?", text_2=documents).json()
    assert [item["score"] for item in scores["data"]] == [found[i] for i in range(4)]
    best = post(ranker, "/rerank", query="which fish?", documents=documents, top_n=1, return_documents=False)
    assert best.json()["results"] == [
        {"index": (first := next(iter(found))), "relevance_score": found[first]}
    ]


def test_a_cross_encoder_reads_both_texts_and_their_types(ranker: ServerProcess) -> None:
    import transformers

    directory = httpx.get(f"{ranker.url}/get_model_info").json()["model_path"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    pairs = [
        ("a question", "an answer"),
        ("an answer", "a question"),
        ("x", "a longer text, with more words"),
    ]
    for first, second in pairs:
        inputs = tokenizer(first, second, return_tensors="pt")
        expected = model(**inputs).logits.sigmoid().item()
        (item,) = post(ranker, "/v1/score", text_1=first, text_2=second).json()["data"]
        assert abs(item["score"] - expected) < 1e-5


def test_a_cross_encoder_makes_no_vectors(ranker: ServerProcess) -> None:
    response = post(ranker, "/v1/embeddings", input="a")
    assert response.status_code == 400 and "/v1/rerank" in response.json()["message"]


def test_pairs_that_are_too_long(ranker: ServerProcess) -> None:
    response = post(ranker, "/v1/score", text_1="a " * 200, text_2=["b", "b " * 200])
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert "input 1 (403 tokens)" in response.json()["message"]


def test_an_embedding_model_scores_by_cosine(server: Server) -> None:
    """The scripted engine's vectors are lengths and token ids, so that cosines can be worked out."""
    answer = server.post(
        "/v1/score", {"model": "default", "text_1": ["a", "ab"], "text_2": ["a", "b"]}
    ).json()
    same, other = (item["score"] for item in answer["data"])
    assert abs(same - 1) < 1e-9 and other < 1
    assert answer["usage"]["prompt_tokens"] == 4  # "a", "ab" and "b": each is computed once


def test_the_measure_is_the_checkpoints(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors are lengths and token ids here: far apart by distance where their angle is small."""
    embedding = server.context.embedding
    assert embedding is not None
    found = {}
    for name in ("cosine", "dot", "euclidean", "manhattan"):
        spec = dataclasses.replace(embedding.spec, similarity=name)
        monkeypatch.setattr(server.context, "embedding", dataclasses.replace(embedding, spec=spec))
        answer = server.post("/v1/score", {"model": "default", "text_1": "a", "text_2": ["a", "ab"]}).json()
        found[name] = [item["score"] for item in answer["data"]]
    vectors = [
        np.array(
            server.post("/v1/embeddings", {"model": "default", "input": text}).json()["data"][0]["embedding"]
        )
        for text in ("a", "ab")
    ]
    difference = vectors[0] - vectors[1]
    assert np.allclose(found["dot"], [vectors[0] @ vectors[0], vectors[0] @ vectors[1]])
    assert np.allclose(found["euclidean"], [0, -np.linalg.norm(difference)])
    assert np.allclose(found["manhattan"], [0, -np.abs(difference).sum()])
    assert len({round(scores[1], 6) for scores in found.values()}) == 4
    ranked = server.post("/v1/rerank", {"model": "default", "query": "a", "documents": ["ab", "a"]}).json()
    assert [item["index"] for item in ranked["results"]] == [1, 0]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("rerank", {"query": "a"}, "documents"),
        ("rerank", {"query": "a", "documents": []}, "documents"),
        ("rerank", {"query": "a", "documents": "b"}, "documents"),
        ("rerank", {"query": "a", "documents": [3]}, "documents"),
        ("rerank", {"query": "a", "documents": ["b", ""]}, "documents"),
        ("rerank", {"query": "a", "documents": [{"title": "b"}]}, "documents"),
        ("rerank", {"query": "a", "documents": ["b"] * 2049}, "documents"),
        ("rerank", {"query": "", "documents": ["b"]}, "query"),
        ("rerank", {"query": ["a"], "documents": ["b"]}, "query"),
        ("rerank", {"documents": ["b"]}, "query"),
        ("rerank", {"query": "a", "documents": ["b"], "top_n": 0}, "top_n"),
        ("rerank", {"query": "a", "documents": ["b"], "return_documents": 1}, "return_documents"),
        ("score", {"text_1": "a"}, "text_2"),
        ("score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
        ("score", {"text_1": "a", "text_2": []}, "text_2"),
        ("score", {"text_1": "a", "text_2": [""]}, "text_2"),
        ("score", {"text_1": 3, "text_2": "a"}, "text_1"),
        ("score", {"text_1": "a", "text_2": "b", "model": None}, "model"),
    ],
)
def test_refusals_name_the_field(server: Server, path: str, body: dict[str, Any], param: str) -> None:
    for prefix in ("/v1/", "/"):
        response = server.post(prefix + path, {"model": "default", **body})
        assert response.status_code == 400, response.text[:300]
        assert response.json()["param"] == param
