"""Texts embedded and pairs scored on a GPU: by the chat model, and by models that do nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.config.engine_config import EngineConfig
from engine.core.build_embedding import load_embedder
from engine.core.embedding_core import EmbeddingCore
from engine.ops import cuda
from engine.ops.placement import on_gpu
from engine.scheduling.settings import Places
from helpers.embedding_models import KINDS, MINILM, expected_vectors, hidden_states, load, random_texts
from helpers.embedding_models import embed as vectors_of
from helpers.embedding_models import make_model as make_embedding_model
from helpers.server_process import ServerProcess
from helpers.tiny_models import make_model, save_model
from parity.test_cross_encoders import KINDS as SCORED
from parity.test_cross_encoders import scores
from parity.test_device_embeddings import LENGTHS, LONGEST, embed, make_embedder, texts_of

pytestmark = pytest.mark.gpu


def gpu_embedder(directory, dtype: str):
    context = cuda.ExecutionContext(is_deterministic=True)
    return make_embedder(directory, on_gpu(dtype), dtype=dtype, ops=cuda, context=context)


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-4), ("bfloat16", 8 * 2**-8)])
def test_vectors_are_those_of_the_cpu(dtype, most, tmp_path):
    """float32 adds in an order of its own, bfloat16 rounds the rows of each of few layers to 8 bits."""
    directory = save_model(make_model("llama").to(getattr(torch, dtype)), tmp_path)
    ours, theirs = gpu_embedder(directory, dtype), make_embedder(directory)
    for texts in (texts_of(*LENGTHS), texts_of(LONGEST)):
        found, expected = embed(ours, texts), embed(theirs, texts)
        error = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert error.max() <= most


def test_deterministic_vectors_do_not_depend_on_their_batch(tmp_path):
    embedder = gpu_embedder(save_model(make_model("llama").bfloat16(), tmp_path), "bfloat16")
    texts = texts_of(*LENGTHS)
    together = embed(embedder, texts)
    for text, vector in zip(texts, together, strict=True):
        assert (embed(embedder, [text])[0] == vector).all()


def test_nothing_waits_for_the_device_before_the_last_yield(tmp_path):
    """torch raises for each copy or question that would; kernels are compiled before."""
    embedder = gpu_embedder(save_model(make_model("llama").bfloat16(), tmp_path), "bfloat16")
    embedder.warm_up()
    assert_that_nothing_waits(embedder, num_slices=4)


def assert_that_nothing_waits(embedder, num_slices: int) -> None:
    texts = [np.arange(LONGEST, dtype=np.int32)]
    embed(embedder, texts)
    work = embedder.compute(texts, [LONGEST], [None])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(num_slices):
            next(work)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(StopIteration):
        next(work)


class OnGpu:
    """A model whose inputs are sent to it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    def __call__(self, ids: torch.Tensor):
        return self._model(ids.cuda())


def gpu_core(directory, *, deterministic: bool = False, **options) -> EmbeddingCore:
    """Of a model that only embeds or scores."""
    config = EngineConfig(model_path=str(directory), device="cuda", **options)
    context = cuda.ExecutionContext(is_deterministic=deterministic)
    embedder = load_embedder(config, str(directory), context, None)
    return EmbeddingCore(embedder, places=Places(max_running_requests=10, max_queued_requests=0))


@pytest.mark.parametrize("kind", KINDS)
def test_models_that_only_embed(kind, tmp_path):
    make_embedding_model(kind).save_pretrained(tmp_path)
    texts = random_texts(24, LONGEST)
    expected = vectors_of(load(tmp_path, pooling="mean"), texts)
    found = vectors_of(gpu_core(tmp_path, pooling="mean", dtype="float32"), texts)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(("kind", "changes"), SCORED)
def test_pairs(kind, changes, tmp_path):
    make_embedding_model(kind, "ForSequenceClassification", num_labels=1, **changes).save_pretrained(tmp_path)
    texts = random_texts(24, 80)
    pairs = list(zip(texts[:12], texts[12:], strict=True))
    found = scores(gpu_core(tmp_path, dtype="float32"), pairs)
    np.testing.assert_allclose(found, scores(load(tmp_path), pairs), atol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_an_encoder_in_bfloat16_errs_as_transformers_does(kind, tmp_path):
    model = make_embedding_model(kind).bfloat16()
    model.save_pretrained(tmp_path)
    texts = random_texts(12, 100)
    model.cuda()
    rounded = torch.stack([hidden_states(OnGpu(model), text).float().mean(0) for text in texts])
    exact = expected_vectors(model.cpu().float(), texts, "mean_tokens")
    theirs = torch.nn.functional.normalize(rounded).cpu().numpy()
    found = vectors_of(gpu_core(tmp_path, pooling="mean"), texts)
    errors = [np.median(np.linalg.norm(x - exact, axis=1)) for x in (found, theirs)]
    assert 0 < errors[0] <= 2 * errors[1]


def test_a_deterministic_encoder_does_not_see_the_batch(tmp_path):
    make_embedding_model("modernbert").bfloat16().save_pretrained(tmp_path)
    core, texts = gpu_core(tmp_path, deterministic=True, pooling="mean"), random_texts(12, LONGEST)
    alone = np.concatenate([vectors_of(core, [text]) for text in texts])
    assert (vectors_of(core, texts) == alone).all()


def test_no_layer_of_an_encoder_waits(tmp_path):
    make_embedding_model("bert").bfloat16().save_pretrained(tmp_path)
    assert_that_nothing_waits(gpu_core(tmp_path, pooling="mean")._embedder, num_slices=3)


def test_a_published_encoder_beside_chat_over_http():
    """Vectors and scores of the same server with and without the GPU."""
    asked = {"model": "mini", "text_1": "a cat", "text_2": ["a kitten", "a car", "tax law"]}
    found = []
    for device in ("cpu", "cuda"):
        flags = "--device", device, "--dtype", "float32", "--embedding-model", f"mini={MINILM}"
        with ServerProcess(*flags, "--context-length", "512") as server:
            server.wait_ready()
            answer = server.http.post("/v1/score", json=asked).json()
            found.append([item["score"] for item in answer["data"]])
    assert found[1] == pytest.approx(found[0], abs=1e-4) and found[0][0] > max(found[0][1:])
