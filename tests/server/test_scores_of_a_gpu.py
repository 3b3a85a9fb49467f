"""/v1/embeddings, /v1/score and /v1/rerank in front of an engine with --device cuda, on a GPU that is only
pretended: what the same server answers on the CPU."""

from __future__ import annotations

import asyncio
import shutil
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from engine.config.engine_config import EngineConfig
from engine.config.model_location import bundled_model
from engine.config.server_config import ServerConfig
from engine.core.build import build_engine
from engine.core.embedding_io import EmbeddingIO
from engine.core.local_client import LocalClient
from engine.server.app import create_app
from engine.server.context import ServerContext
from engine.server.listening import cut_off, start_serving
from engine.server.model_files import ModelFiles
from helpers.embedding_models import MINILM, make_model
from helpers.http_server import Sanic
from helpers.pretend_gpu import pretended
from helpers.tiny_models import make_model as make_chat_model
from helpers.tiny_models import save_model

SIZES = {"context_length": 32, "max_running_requests": 1, "chunked_prefill_size": 16, "max_total_tokens": 32}
VOCAB_SIZE = 4096
"""As many ids as the bundled model's tokenizer has."""
DOCUMENTS = ["one fish", "two fish, and more of them", "red"]
ASKED = {
    "/v1/score": {"text_1": "which fish?", "text_2": DOCUMENTS},
    "/v1/rerank": {"query": "which fish?", "documents": DOCUMENTS},
}

assert Sanic.test_mode  # more than one server in this process


async def _answers(config: EngineConfig, model: str, asked: dict[str, Any]) -> dict[str, Any]:
    """By path. All of the engine runs in this thread, whose operations stay on the CPU where they must."""
    core, ready = build_engine(config)
    client = LocalClient(core, ready)
    chosen = ServerConfig()
    files = ModelFiles.load(
        config.tokenizer_path or config.model_path, sampling_defaults=chosen.sampling_defaults
    )
    context = ServerContext(client=client, config=chosen, engine_config=config, model=files)
    assert ready.embedding is not None
    context.embedding = EmbeddingIO.load(config, ready.embedding, files.tokenizer)
    listener = socket.create_server(("127.0.0.1", 0))
    server = await start_serving(create_app(context), listener, backlog=16)
    try:
        async with httpx.AsyncClient(timeout=60, trust_env=False) as http:
            found = {}
            for path, body in asked.items():
                url = f"http://127.0.0.1:{listener.getsockname()[1]}{path}"
                response = await http.post(url, json={"model": model, **body})
                assert response.status_code == 200, response.text
                found[path] = response.json()
            return found
    finally:
        await cut_off(server)
        await client.close()


def answers(device: str, asked: dict[str, Any], **options: Any) -> dict[str, Any]:
    config = EngineConfig(device=device, dtype="float32", **options)
    return asyncio.run(_answers(config, config.embedding_model or config.model_path, asked))


def with_tokenizer(model: torch.nn.Module, directory: Path) -> str:
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MINILM / name, directory)
    return str(directory)


def chat_model(directory: Path) -> dict[str, Any]:
    path = save_model(make_chat_model("llama", vocab_size=VOCAB_SIZE, num_hidden_layers=1), directory)
    return {"model_path": str(path), "tokenizer_path": str(bundled_model()), "max_lora_rank": 1, **SIZES}


def pooled_chat_model(directory: Path) -> dict[str, Any]:
    return {**chat_model(directory), "pooling": "mean"}


def model_beside_chat(directory: Path) -> dict[str, Any]:
    small = make_model("bert", vocab_size=30522, num_hidden_layers=1, max_position_embeddings=64)
    path = with_tokenizer(small, directory / "embeds")
    return {**chat_model(directory / "chat"), "embedding_model": path, "pooling": "mean"}


def cross_encoder(directory: Path) -> dict[str, Any]:
    sizes = {"vocab_size": 30522, "num_hidden_layers": 1, "num_labels": 1}
    path = with_tokenizer(make_model("bert", "ForSequenceClassification", **sizes), directory)
    return {"model_path": path, "context_length": 64}


@pytest.mark.parametrize("made", [pooled_chat_model, model_beside_chat, cross_encoder])
def test_scores_are_those_of_the_cpu(made, tmp_path):
    options = made(tmp_path)
    asked = dict(ASKED) if made is cross_encoder else {**ASKED, "/v1/embeddings": {"input": DOCUMENTS}}
    expected = answers("cpu", asked, **options)
    with pretended():
        found = answers("cuda", asked, **options)
    assert [found[path]["usage"] for path in asked] == [expected[path]["usage"] for path in asked]
    ours, theirs = ([item["score"] for item in by_path["/v1/score"]["data"]] for by_path in (found, expected))
    assert ours == pytest.approx(theirs, abs=1e-5) and len(set(theirs)) == len(DOCUMENTS)
    ours, theirs = (
        [item["index"] for item in by_path["/v1/rerank"]["results"]] for by_path in (found, expected)
    )
    assert ours == theirs
    if made is not cross_encoder:  # which makes no vectors
        for ours, theirs in zip(
            found["/v1/embeddings"]["data"], expected["/v1/embeddings"]["data"], strict=True
        ):
            assert ours["embedding"] == pytest.approx(theirs["embedding"], abs=1e-5)
