"""Texts embedded on the path of a GPU, on CPU tensors: the vectors of the CPU's path."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine import LLM
from engine.config.model_location import bundled_model
from engine.errors import DeviceLost
from engine.models.embedding_head import EmbeddingHead
from engine.models.embedding_spec import EmbeddingSpec
from engine.ops import native
from engine.ops.placement import CPU, Placement, on_gpu
from engine.ops.transfer import fetch
from engine.runner import device_pooling
from engine.runner.decoder_embedder import DecoderEmbedder
from helpers import device_ops
from helpers.pretend_gpu import pretended
from helpers.tiny_models import VOCAB_SIZE, make_model, save_model
from parity.driving import make_runner

MODES = ("cls", "max", "mean", "mean_sqrt_len", "weighted_mean", "last")
LENGTHS = (1, 5, 40, 17, 1)
LONGEST = 200


def make_embedder(directory, placement: Placement = CPU, **options) -> DecoderEmbedder:
    """With every way of pooling, its vectors one behind the other, in batches of 64 tokens."""
    if not placement.is_host:
        options = {"ops": device_ops, "placement": placement} | options
    runner = make_runner(directory, **options)
    spec = EmbeddingSpec(pooling=MODES, is_normalized=False)
    head = EmbeddingHead(spec, runner.spec.hidden_size, ops=native, ctx=native.ExecutionContext(1, "auto"))
    sizes = {"block_size": 16, "max_tokens": 64, "max_len": LONGEST}
    dtype = options.get("dtype", "float32")
    return DecoderEmbedder(
        runner.model, runner.spec, head, dtype=dtype, placement=placement, ctx=runner.context, **sizes
    )


def texts_of(*lengths: int) -> list[np.ndarray]:
    draw = np.random.default_rng(sum(lengths))
    return [draw.integers(0, VOCAB_SIZE, length, np.int32) for length in lengths]


def embed(embedder: DecoderEmbedder, texts: list[np.ndarray]) -> np.ndarray:
    work = embedder.compute(texts, [len(text) for text in texts], [None] * len(texts))
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_vectors_are_those_of_the_cpu(kind, tmp_path):
    """Sums are float32 on both sides, in orders of their own; one text is longer than a batch."""
    directory = save_model(make_model(kind), tmp_path)
    ours, theirs = make_embedder(directory, on_gpu("float32", "cpu")), make_embedder(directory)
    for texts in (texts_of(*LENGTHS), texts_of(LONGEST), texts_of(64)):
        found, expected = embed(ours, texts), embed(theirs, texts)
        assert found.shape == expected.shape == (len(texts), ours.info.size)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_half_precision_rounds_rows_and_no_sums(tmp_path):
    directory = save_model(make_model("llama").bfloat16(), tmp_path)
    ours = make_embedder(directory, on_gpu("bfloat16", "cpu"), dtype="bfloat16")
    texts = texts_of(*LENGTHS)
    found, expected = embed(ours, texts), embed(make_embedder(directory), texts)
    error = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert 0 < error.max() < 8 * 2**-8, "some roundings of 8 bits in each of few layers"


def test_a_vector_follows_from_its_text_alone(tmp_path):
    """Pooling adds a text's rows in one order; products may follow the batch (docs/gpu.md)."""
    embedder = make_embedder(save_model(make_model("llama"), tmp_path), on_gpu("float32", "cpu"))
    texts = texts_of(*LENGTHS)
    together = embed(embedder, texts)
    for text, vector in zip(texts, together, strict=True):
        np.testing.assert_allclose(embed(embedder, [text])[0], vector, rtol=1e-5, atol=1e-5)


def test_the_host_waits_for_nothing_before_the_last_yield(tmp_path, monkeypatch):
    embedder = make_embedder(save_model(make_model("llama"), tmp_path), on_gpu("float32", "cpu"))
    waits: list[str] = []

    def watched(parts):
        wait = fetch(parts)
        waits.append("sent")
        return lambda: waits.append("waited") or wait()

    monkeypatch.setattr(device_pooling, "fetch", watched)

    work = embedder.compute(texts_of(LONGEST), [LONGEST], [None])
    seen = []
    with pytest.raises(StopIteration):
        while True:
            next(work)
            seen.append(list(waits))
    assert seen == [[], [], [], ["sent"]] and waits == ["sent", "waited"]


def test_a_gpu_that_is_lost_is_told_from_a_batch_that_failed(tmp_path, monkeypatch):
    embedder = make_embedder(save_model(make_model("llama"), tmp_path), on_gpu("float32", "cpu"))

    def fail(*arguments):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(device_ops, "paged_attention", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        embed(embedder, texts_of(3))
    embedder._ctx.is_lost = True
    with pytest.raises(DeviceLost, match="computes nothing more for this process: CUDA error: an illegal"):
        embed(embedder, texts_of(3))


def test_an_engine_embeds_as_on_the_cpu(tmp_path):
    """From flags to vectors, on emulated and interpreted kernels, beside generation."""
    directory = str(save_model(make_model("llama"), tmp_path))
    options = {
        "pooling": "mean",
        "dtype": "float32",
        "context_length": 64,
        "max_running_requests": 2,
        "chunked_prefill_size": 32,
        "max_total_tokens": 256,
        "tokenizer_path": str(bundled_model()),
    }
    prompts = [[5, 6, 7] * 3, [9], list(range(40))]
    with LLM(directory, **options) as llm:
        expected = llm.embed(prompts)
    with pretended(), LLM(directory, device="cuda", **options) as llm:
        np.testing.assert_allclose(llm.embed(prompts), expected, atol=1e-5)
    assert torch.get_default_device().type == "cpu"
