"""Adapters on a base whose weights are rounded: the base's share has its error, the adapter's has none."""

from __future__ import annotations

import copy

import pytest
import torch

from engine.adapters.adapter_pool import PoolEntry
from helpers.adapters import LINEAR, MODULES, make_adapter, save_adapter
from helpers.llama_formats import RoundedLinear, Rounding, q4_0, q8_0
from helpers.tiny_models import make_model, save_model
from parity.driving import make_request, make_runner, step_logits

NUM_TOKENS = 160
SIZES = {"hidden_size": 384, "intermediate_size": 640, "num_hidden_layers": 2, "vocab_size": 800}
TOKENS = torch.randint(3, 800, (NUM_TOKENS,), generator=torch.Generator().manual_seed(3)).tolist()
RATIO = {"int8": 2.0, "int4": 1.2}
"""As for a base without adapters."""

ROUNDING = {"int8": q8_0, "int4": q4_0}


@pytest.fixture(scope="module")
def model():
    return make_model("qwen2", use_sliding_window=False, **SIZES)


@pytest.fixture(scope="module", params=RATIO)
def quantized(request, model, tmp_path_factory):
    """(format, runner of the base in it)"""
    directory = save_model(model, tmp_path_factory.mktemp("quantized"))
    return request.param, make_runner(directory, quantization=request.param, max_lora_rank=256)


@torch.no_grad()
def logprobs_of(model) -> torch.Tensor:
    return model(torch.tensor([TOKENS])).logits[0].double().log_softmax(-1)


def with_rounded_base(wrapped, weights: Rounding):
    """A copy of what peft made, whose own layers are rounded and those of the adapter are not."""
    wrapped = copy.deepcopy(wrapped)
    embedding = wrapped.get_input_embeddings()
    embedding = getattr(embedding, "base_layer", embedding)
    embedding.weight = torch.nn.Parameter(weights(embedding.weight.data))
    for path, module in list(wrapped.named_modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear) and "lora_" not in path:
                setattr(module, name, RoundedLinear(child, weights, q8_0))
    return wrapped


def our_logprobs(runner, adapter) -> torch.Tensor:
    request = make_request(TOKENS)
    if adapter is not None:
        request.adapter = PoolEntry(None, runner.adapter_reader.load(adapter).weights)
    return torch.stack([step_logits(runner, request, 1) for _ in TOKENS]).double().log_softmax(-1)


def divergence(exact: torch.Tensor, other: torch.Tensor) -> float:
    """Kullback-Leibler, mean over the tokens."""
    return float((exact.exp() * (exact - other)).sum(-1).mean())


@pytest.mark.parametrize(("targets", "rank"), [(LINEAR, 16), (MODULES, 64), (("q_proj", "v_proj"), 1)])
def test_error_is_bounded_by_that_of_a_known_format_of_the_base_alone(
    quantized, model, targets, rank, tmp_path
):
    quantization, runner = quantized
    wrapped = make_adapter(model, targets, rank=rank, seed=rank)
    try:
        exact = logprobs_of(wrapped)
        theirs = divergence(exact, logprobs_of(with_rounded_base(wrapped, ROUNDING[quantization])))
        ours = divergence(exact, our_logprobs(runner, save_adapter(wrapped, tmp_path / "adapter")))
    finally:
        wrapped.unload()
    assert 0 < ours <= RATIO[quantization] * theirs
    without = divergence(exact, our_logprobs(runner, None))
    assert without > 3 * ours, "the adapter changes nothing, so the test shows nothing"
