"""Quantised models against full precision: their error is bounded by that of formats that people know."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from tokenizers import Tokenizer

from engine.config.model_location import bundled_model
from engine.demo import corpus
from engine.demo.tokenizer import render
from engine.errors import CheckpointError
from engine.ops import reference
from helpers.llama_formats import blockwise, q4_0, q8_0, with_rounded_weights
from helpers.tiny_models import load_model, make_model, save_model
from parity.driving import make_request, make_runner, step_logits

NUM_TOKENS = 320
NUM_CORPUS_TOKENS = 700
RATIO = {"bf16_dot": 0.15, "int8": 2.0, "int4": 1.2}
ROUNDING = {"bf16_dot": q8_0, "int8": q8_0, "int4": q4_0}
PLANTED = 50.0
"""How much larger planted channels are than the others."""

MODELS = ["bundled", "random", "input channels", "weight columns", "hidden channels", "embedding", "rows"]


def plant(model, kind: str) -> None:
    """Four channels that are far larger than the others: in what layers read, in the weights that read
    it, in both so that the product stays as it was, in the residual stream, or in rows of weights."""
    generator = torch.Generator().manual_seed(1)
    channels = torch.randperm(model.config.hidden_size, generator=generator)[:4]
    if kind == "embedding":
        model.model.embed_tokens.weight[:, channels] *= PLANTED
    norm_factor = {"input channels": PLANTED, "hidden channels": PLANTED}.get(kind, 1)
    column_factor = {"weight columns": PLANTED, "hidden channels": 1 / PLANTED}.get(kind, 1)
    for layer in model.model.layers:
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        attention, mlp = layer.self_attn, layer.mlp
        readers = [attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj]
        for norm in norms:
            norm.weight[channels] *= norm_factor
        for linear in readers:
            linear.weight[:, channels] *= column_factor
        if kind == "rows":
            for linear in (attention.v_proj, mlp.gate_proj, mlp.up_proj):
                linear.weight[torch.randperm(len(linear.weight), generator=generator)[:4]] *= PLANTED


def corpus_ids() -> list[int]:
    """Of dialogues that the bundled model was made for. A text that repeats itself would be a few tokens."""
    text = "".join(render(document) for document in islice(corpus.documents(1), 40))
    return Tokenizer.from_file(str(bundled_model() / "tokenizer.json")).encode(text).ids[:NUM_CORPUS_TOKENS]


@pytest.fixture(scope="module", params=MODELS)
def model_and_tokens(request, tmp_path_factory):
    """(directory, model in float32, tokens, their log-probabilities in full precision)"""
    if request.param == "bundled":
        directory, tokens = bundled_model(), corpus_ids()
    else:
        sizes = {"hidden_size": 384, "intermediate_size": 640, "num_hidden_layers": 2, "vocab_size": 800}
        model = make_model("qwen2", use_sliding_window=False, **sizes)
        with torch.no_grad():
            plant(model, request.param)
        directory = save_model(model, tmp_path_factory.mktemp("quantized"))
        generator = torch.Generator().manual_seed(3)
        tokens = torch.randint(3, 800, (NUM_TOKENS,), generator=generator).tolist()
    model = load_model(directory, torch.float32)
    return directory, model, tokens, logprobs_of(model, tokens)


@torch.no_grad()
def logprobs_of(model, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)


def our_logprobs(directory, tokens: list[int], quantization: str, dtype: str) -> torch.Tensor:
    runner = make_runner(directory, quantization=quantization, dtype=dtype)
    request = make_request(tokens)
    rows = [step_logits(runner, request, 1) for _ in tokens]
    return torch.stack(rows).double().log_softmax(-1)


def divergence(exact: torch.Tensor, other: torch.Tensor) -> float:
    """Kullback-Leibler, mean over the tokens."""
    return float((exact.exp() * (exact - other)).sum(-1).mean())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", RATIO)
def test_error_is_bounded_by_that_of_a_known_format(model_and_tokens, quantization, dtype):
    """Over a cache of bfloat16 attention multiplies in that, too."""
    directory, model, tokens, exact = model_and_tokens
    theirs = divergence(exact, logprobs_of(with_rounded_weights(model, ROUNDING[quantization]), tokens))
    ours = divergence(exact, our_logprobs(directory, tokens, quantization, dtype))
    assert 0 < ours <= RATIO[quantization] * theirs


def test_planted_channels_would_break_the_bound_of_a_plain_scheme(tmp_path):
    """The bound is not empty: one scale for 128 numbers, and nothing done about outliers, exceeds it."""

    def plain(values: torch.Tensor) -> torch.Tensor:
        def rounded(blocks: torch.Tensor) -> torch.Tensor:
            scale = blocks.abs().amax(-1, keepdim=True) / 127
            return torch.where(scale > 0, blocks / scale, 0).round() * scale

        return blockwise(values, 128, rounded)

    model = make_model("qwen2", use_sliding_window=False, hidden_size=384, vocab_size=800)
    with torch.no_grad():
        plant(model, "hidden channels")
    tokens = torch.randint(3, 800, (NUM_TOKENS,), generator=torch.Generator().manual_seed(3)).tolist()
    exact = logprobs_of(model, tokens)
    theirs, plainly = (
        divergence(exact, logprobs_of(with_rounded_weights(model, rounding, rounding), tokens))
        for rounding in (q8_0, plain)
    )
    assert plainly > RATIO["int8"] * theirs


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["llama3", "qwen3"])
def test_whole_model_agrees_with_the_plain_one(tmp_path, kind, quantization):
    """The same weights and the same rounding in plain PyTorch. An activation that is nearly a tie may be
    rounded the other way, and all that follows then differs; that happens to few of the prompts."""
    directory = save_model(make_model(kind), tmp_path)
    ours, plain = (
        make_runner(directory, quantization=quantization, **ops) for ops in ({}, {"ops": reference})
    )
    errors = []
    for seed in range(15):
        prompt = torch.randint(3, 512, (6,), generator=torch.Generator().manual_seed(seed)).tolist()
        logits, expected = (step_logits(runner, make_request(prompt), 6) for runner in (ours, plain))
        errors.append(float((logits - expected).abs().max() / expected.std()))
    assert sorted(errors)[len(errors) // 2] <= 1e-4
    assert max(errors) <= 0.5


@pytest.mark.parametrize(("quantization", "is_held"), [("int4", False), ("int8", True), ("none", True)])
@pytest.mark.parametrize("sign", [1, -1])
def test_weights_beyond_four_bits_with_a_half_precision_scale_are_refused(
    tmp_path, quantization, is_held, sign
):
    """8 x 65,504 is the most: what is larger would become that, or infinite."""
    directories, name = [tmp_path / "held", tmp_path / "beyond"], "model.layers.1.mlp.up_proj"
    for directory, value in zip(directories, (524_032.0, 524_033.0), strict=True):
        model = make_model("qwen2")
        with torch.no_grad():
            model.get_parameter(f"{name}.weight")[3, 5] = sign * value
        save_model(model, directory)
    make_runner(directories[0], quantization=quantization)
    if is_held:
        make_runner(directories[1], quantization=quantization)
        return
    says = f"weights of {name} reach 524,033: int4 holds 524,032 at most, int8 any"
    with pytest.raises(CheckpointError) as refusal:
        make_runner(directories[1], quantization=quantization)
    assert refusal.value.message == says
