"""Texts embedded by the chat model on a GPU, against the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.ops import cuda
from engine.ops.placement import on_gpu
from helpers.tiny_models import make_model, save_model
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
    texts = texts_of(LONGEST)
    embed(embedder, texts)
    work = embedder.compute(texts, [LONGEST], [None])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            next(work)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(StopIteration):
        next(work)
