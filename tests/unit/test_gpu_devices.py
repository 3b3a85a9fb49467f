"""Every tensor of an encoder is where the GPU is: torch's meta device stands for that one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from engine.config.engine_config import EngineConfig
from engine.core import build_embedding
from engine.models.encoder_layers import EncoderLayer, LayerNorm, Table
from engine.models.layers import FusedLinear
from engine.ops import cuda
from engine.ops.cuda.matrix import PackedMatrix
from engine.ops.placement import on_gpu
from engine.runner.device_inputs import send_texts
from engine.runner.encoder_embedder import encoder_inputs
from helpers.embedding_models import make_model
from unit.test_gpu_memory import Context, no_kernels

__all__ = ["no_kernels"]  # a fixture
HOLDERS = EncoderLayer, FusedLinear, LayerNorm, PackedMatrix, Table


def tensors_of(holder: Any) -> list[torch.Tensor]:
    """Of an object, its layers and what these hold; but for notes of what was loaded."""
    found = []
    for name, value in vars(holder).items():
        values = value if isinstance(value, list | tuple) else [value]
        values = value.values() if isinstance(value, dict) else values
        for part in values:
            parts = part if isinstance(part, tuple) else [part]
            found += [tensor for tensor in parts if isinstance(tensor, torch.Tensor) and name != "_is_packed"]
            if isinstance(part, HOLDERS) or type(part).__name__ == "_Segment":
                found += tensors_of(part)
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "modernbert"])
def test_nothing_of_an_encoder_is_left_on_the_host(kind, dtype, tmp_path, no_kernels):
    model = make_model(kind, "ForSequenceClassification", num_labels=1)
    model.save_pretrained(tmp_path)
    placement = on_gpu(dtype, "meta")
    common = {"ops": cuda, "placement": placement, "ctx": Context(), "dtype": dtype}
    config = EngineConfig(model_path=str(tmp_path), device="cuda")
    ranker = build_embedding._load(config, tmp_path, 0, {**common, "is_dummy": True, "progress": None})
    tensors = tensors_of(ranker._encoder) + tensors_of(ranker._head)
    assert len(tensors) > 20 and {tensor.device.type for tensor in tensors} == {"meta"}
    texts = [np.arange(count, dtype=np.int32) for count in (3, 1, 20)]
    inputs = send_texts(encoder_inputs(texts, ranker._spec, [2, 1, 5]), placement.device)
    work = ranker._encoder.forward(inputs)
    with pytest.raises(StopIteration) as end:
        while True:
            next(work)
    hidden = end.value.value
    assert (hidden.device.type, hidden.dtype) == ("meta", placement.activations)
    scores = ranker._head.scores(ranker._pooled(hidden, inputs.plan.cu_seqlens_q))
    assert (scores.device.type, scores.dtype, scores.shape) == ("meta", torch.float32, (3, 1))
