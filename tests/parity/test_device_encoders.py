"""Models that only embed or score on the path of a GPU, on CPU tensors: the numbers of the CPU's path."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import LLM
from engine.config.engine_config import EngineConfig
from engine.core import build_embedding
from engine.core.build_embedding import load_embedder
from engine.core.embedding_core import EmbeddingCore
from engine.errors import DeviceLost
from engine.ops.placement import on_gpu
from engine.ops.transfer import fetch
from engine.runner import cross_encoder, device_pooling
from engine.scheduling.settings import Places
from helpers import device_ops
from helpers.embedding_models import (
    KINDS,
    MINILM,
    NORMALIZE,
    POOLINGS,
    embed,
    expected_vectors,
    hidden_states,
    load,
    make_model,
    pooling,
    random_texts,
    write_modules,
)
from helpers.pretend_gpu import pretended
from parity.test_cross_encoders import KINDS as SCORED
from parity.test_cross_encoders import scores

LONGEST = 200


def device_core(directory: Path, **config) -> EmbeddingCore:
    """What the engine would embed with on a GPU, references standing for its kernels."""

    def placed(chosen: EngineConfig, dtype: str) -> dict:
        return {"ops": device_ops, "placement": on_gpu(dtype, "cpu")}

    chosen = EngineConfig(model_path=str(directory), device="cuda", **config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_embedding, "_placed", placed)
        embedder = load_embedder(chosen, str(directory), device_ops.ExecutionContext(), None)
    return EmbeddingCore(embedder, places=Places(max_running_requests=10, max_queued_requests=0))


def save(kind: str, directory: Path, *modes: str, **changes) -> torch.nn.Module:
    model = make_model(kind, **changes)
    model.save_pretrained(directory)
    write_modules(directory, pooling(*(modes or ("mean_tokens",))), NORMALIZE)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_embeds_as_on_the_cpu(kind, tmp_path):
    """Tokens of one text alone among them, and in learned positions' families padding tokens."""
    save(kind, tmp_path)
    texts = random_texts(12, LONGEST) + [[1, 5, 1, 1, 7], [1]]
    expected = embed(load(tmp_path), texts)
    found = embed(device_core(tmp_path), texts)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_every_way_of_pooling(tmp_path):
    modes = [mode for mode in POOLINGS if mode != "lasttoken"]
    save("bert", tmp_path, *modes)
    texts = random_texts(8, 60)
    np.testing.assert_allclose(embed(device_core(tmp_path), texts), embed(load(tmp_path), texts), atol=2e-5)


@pytest.mark.parametrize(("kind", "changes"), SCORED)
def test_pairs_score_as_on_the_cpu(kind, changes, tmp_path):
    make_model(kind, "ForSequenceClassification", num_labels=1, **changes).save_pretrained(tmp_path)
    texts = random_texts(16, 80)
    pairs = list(zip(texts[:8], texts[8:], strict=True))
    core = device_core(tmp_path)
    assert core.info.scores_pairs
    np.testing.assert_allclose(scores(core, pairs), scores(load(tmp_path), pairs), atol=2e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_half_precision_errs_as_transformers_does(kind, dtype, tmp_path):
    model = make_model(kind).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    texts = random_texts(12, 100)
    rounded = torch.stack([hidden_states(model, text).float().mean(0) for text in texts])
    exact = expected_vectors(model.float(), texts, "mean_tokens")
    found = embed(device_core(tmp_path, pooling="mean", dtype=dtype), texts)
    theirs = torch.nn.functional.normalize(rounded).numpy()
    errors = [np.median(np.linalg.norm(x - exact, axis=1)) for x in (found, theirs)]
    assert 0 < errors[0] <= 2 * errors[1], "as many roundings, at other places"


def test_the_host_waits_for_nothing_before_the_last_yield(tmp_path, monkeypatch):
    """Of a vector and of a score; both yield between their layers."""
    waits: list[str] = []

    def watched(parts):
        wait = fetch(parts)
        waits.append("sent")
        return lambda: waits.append("waited") or wait()

    save("roberta", tmp_path / "embeds")
    ranker = make_model("bert", "ForSequenceClassification", num_labels=1)
    ranker.save_pretrained(tmp_path / "scores")
    cores = [device_core(tmp_path / name) for name in ("embeds", "scores")]
    for module in (device_pooling, cross_encoder):
        monkeypatch.setattr(module, "fetch", watched)
    for core in cores:
        waits.clear()
        work = core._embedder.compute([np.array([1, 5, 6], np.int32)], [2], [None])
        for expected in ([], [], ["sent"]):  # three layers
            next(work)
            assert waits == expected
        with pytest.raises(StopIteration):
            next(work)
        assert waits == ["sent", "waited"]


@pytest.mark.parametrize("kind", ["bert", "qwen3"])
def test_a_gpu_that_is_lost_is_told_from_a_batch_that_failed(kind, tmp_path, monkeypatch):
    save(kind, tmp_path)
    embedder = device_core(tmp_path)._embedder

    def fail(*arguments):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(device_ops, "paged_attention", fail)
    work = [np.array([5, 6], np.int32)], [2], [None]
    with pytest.raises(RuntimeError, match="illegal memory access"):
        list(embedder.compute(*work))
    embedder._ctx.is_lost = True
    with pytest.raises(DeviceLost, match="computes nothing more for this process: CUDA error: an illegal"):
        list(embedder.compute(*work))


SIZES = {"dtype": "float32", "context_length": 64, "pooling": "mean"}


def with_tokenizer(model: torch.nn.Module, directory: Path) -> str:
    """A tiny random model with a published tokenizer."""
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MINILM / name, directory)
    return str(directory)


@pytest.mark.parametrize("deterministic", [False, True])
def test_an_engine_of_an_encoder_embeds_as_on_the_cpu(deterministic, tmp_path):
    """From flags to vectors, on emulated and interpreted kernels."""
    directory = with_tokenizer(make_model("bert", vocab_size=30522, num_hidden_layers=1), tmp_path)
    texts = ["a dog", "", "the capital of France is Paris"]
    with LLM(directory, **SIZES) as llm:
        expected = llm.embed(texts)
    with pretended(), LLM(directory, device="cuda", deterministic=deterministic, **SIZES) as llm:
        np.testing.assert_allclose(llm.embed(texts), expected, atol=1e-5)
    assert torch.get_default_device().type == "cpu"
