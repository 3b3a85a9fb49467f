"""Tiny random models saved by transformers and loaded by us: the same logits, the same tokens."""

from __future__ import annotations

import pytest
import torch

from helpers.native import FMA_ISAS
from helpers.tiny_models import (
    CONTEXT,
    KINDS,
    TRANSFORMERS_KINDS,
    VOCAB_SIZE,
    WINDOW,
    WRITTEN_OUT_KINDS,
    load_model,
    make_model,
    save_model,
)
from parity.driving import generate, make_runner

NUM_TOKENS = 64
PROMPT_LENGTHS = (1, 2, 17, 63, 64, 65, 200, 700)
TOLERANCE = 1e-4
ROPE_BASE = {"rope_type": "default", "rope_theta": 10000.0}
OTHER_BASE = {**ROPE_BASE, "rope_theta": 10500.0}


def make_prompt(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()


@torch.no_grad()
def their_logits(model, prompt: list[int], continuation: list[int]) -> torch.Tensor:
    """Logits [len(continuation), V] from which each token of the continuation is chosen."""
    ids = torch.tensor([prompt + continuation[:-1]], device=model.device)
    return model(ids, use_cache=False).logits[0, len(prompt) - 1 :].float()


@torch.no_grad()
def their_greedy(model, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NUM_TOKENS,
        min_new_tokens=NUM_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def worst_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference in units of the standard deviation of their logits."""
    return float((ours - theirs).abs().max() / theirs.std())


@pytest.fixture(scope="module", params=[*KINDS, *TRANSFORMERS_KINDS])
def pair(request, tmp_path_factory):
    model = make_model(request.param)
    return model, make_runner(save_model(model, tmp_path_factory.mktemp(request.param)))


@pytest.mark.parametrize("length", PROMPT_LENGTHS)
def test_float32_agrees(pair, length):
    model, runner = pair
    prompt = make_prompt(length)
    tokens, logits = generate(runner, prompt, NUM_TOKENS)
    assert tokens == their_greedy(model, prompt)
    theirs = their_logits(model, prompt, tokens)
    assert theirs.std() >= 1
    assert len(set(tokens)) >= 20
    assert worst_error(logits, theirs) <= TOLERANCE


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *((kind, {"rope_parameters": OTHER_BASE}) for kind in ("llama", "mistral", "qwen2", "qwen3")),
        ("llama3", {"rope_parameters": {**KINDS["llama3"][1]["rope_parameters"], "rope_theta": 10500.0}}),
        ("mistral", {"sliding_window": WINDOW - 1}),
        ("mistral", {"sliding_window": WINDOW + 1}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"sliding_window": WINDOW + 1}),
        ("qwen2", {"max_window_layers": 2}),
        ("qwen2", {"use_sliding_window": False}),
        ("qwen3", {"sliding_window": WINDOW + 1}),
        ("llama3", {"rope_parameters": ROPE_BASE}),
        ("llama3", {"rope_parameters": {**KINDS["llama3"][1]["rope_parameters"], "factor": 9.0}}),
        ("llama3", {"rope_parameters": {**KINDS["llama3"][1]["rope_parameters"], "low_freq_factor": 1.5}}),
        ("llama3", {"rope_parameters": {**KINDS["llama3"][1]["rope_parameters"], "high_freq_factor": 5.0}}),
        (
            "llama3",
            {
                "rope_parameters": {
                    **KINDS["llama3"][1]["rope_parameters"],
                    "original_max_position_embeddings": CONTEXT + 8,
                }
            },
        ),
        ("llama_linear", {"rope_parameters": ROPE_BASE}),
        ("llama_linear", {"rope_parameters": {**KINDS["llama_linear"][1]["rope_parameters"], "factor": 4.2}}),
        ("qwen2_yarn", {"rope_parameters": {**KINDS["qwen2_yarn"][1]["rope_parameters"], "factor": 15.0}}),
        ("gemma2", {"attn_logit_softcapping": 9.0}),
        ("gemma2", {"final_logit_softcapping": 6.5}),
        ("gemma2", {"query_pre_attn_scalar": 17}),
        ("gemma2", {"sliding_window": WINDOW + 1}),
        ("gemma3", {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}),
        ("gemma3", {"rope_parameters": {"full_attention": ROPE_BASE, "sliding_attention": ROPE_BASE}}),
        ("granite", {"embedding_multiplier": 6.5}),
        ("granite", {"attention_multiplier": 0.1}),
        ("granite", {"residual_multiplier": 0.75}),
        ("granite", {"logits_scaling": 0.6}),
        ("phi3", {"sliding_window": WINDOW + 1}),
        ("smollm3", {"no_rope_layer_interval": 3}),
        ("cohere2", {"sliding_window": WINDOW + 1}),
        ("cohere2", {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}),
        ("stablelm", {"rope_parameters": {**ROPE_BASE, "partial_rotary_factor": 0.5}}),
        ("deepseek_v3", {"routed_scaling_factor": 2.0}),
        ("olmoe", {"norm_topk_prob": True}),
        ("gpt_neo", {"window_size": WINDOW + 1}),
        ("gptj", {"rotary_dim": 32}),
    ],
)
def test_comparison_notices_a_wrong_configuration(kind, changes, tmp_path):
    """The same weights under a slightly different configuration must not pass."""
    prompt = make_prompt(200)
    right, wrong = make_model(kind), make_model(kind, **changes)
    runner = make_runner(save_model(wrong, tmp_path))
    tokens, logits = generate(runner, prompt, 8)
    assert worst_error(logits, their_logits(wrong, prompt, tokens)) <= TOLERANCE
    assert worst_error(logits, their_logits(right, prompt, tokens)) > 10 * TOLERANCE


@pytest.mark.parametrize("kind", WRITTEN_OUT_KINDS)
def test_modules_that_write_their_attention_out(kind, tmp_path):
    model = make_model(kind)
    runner = make_runner(save_model(model, tmp_path))
    for length in (1, 65, 700):
        prompt = make_prompt(length)
        tokens, logits = generate(runner, prompt, NUM_TOKENS)
        assert tokens == their_greedy(model, prompt)
        theirs = their_logits(model, prompt, tokens)
        assert theirs.std() >= 1 and len(set(tokens)) >= 20
        assert worst_error(logits, theirs) <= TOLERANCE
    again = generate(runner, prompt, 8, 37)
    assert again[0] == tokens[:8] and torch.equal(again[1], logits[:8])


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("heads", [4, 5])
def test_biases_of_positions_that_are_rounded(heads, is_shared, tmp_path):
    """Falcon's are bfloat16, and it may have one key for all queries, which then differ in their biases."""
    changes = {"num_attention_heads": heads, "hidden_size": 32 * heads, "multi_query": is_shared}
    model = make_model("falcon", alibi=True, parallel_attn=False, bias=True, **changes)
    runner = make_runner(save_model(model, tmp_path))
    assert runner.verdict == (True, "")
    prompt = make_prompt(700)
    tokens, logits = generate(runner, prompt, 16)
    theirs = their_logits(model, prompt, tokens)
    assert theirs.argmax(-1).tolist() == tokens and worst_error(logits, theirs) <= TOLERANCE
    again = generate(runner, prompt, 16, 37)
    assert again[0] == tokens and torch.equal(again[1], logits)
    plain = make_model("falcon", parallel_attn=False, bias=True, **changes)
    assert worst_error(logits, their_logits(plain, prompt, tokens)) > 10 * TOLERANCE


@pytest.mark.parametrize("head_dim", [16, 32, 48])
def test_heads_as_small_as_those_of_small_models(head_dim, tmp_path):
    model = make_model("qwen3", head_dim=head_dim)
    save_model(model, tmp_path)
    prompt = make_prompt(200)
    tokens, logits = generate(make_runner(tmp_path), prompt, 8)
    theirs = their_logits(model, prompt, tokens)
    assert worst_error(logits, theirs) <= TOLERANCE and theirs.argmax(-1).tolist() == tokens
    for isa in FMA_ISAS:
        again = generate(make_runner(tmp_path, isa=isa), prompt, 8, 37)
        assert again[0] == tokens and torch.equal(again[1], logits)
    rounded = generate(make_runner(tmp_path, kv_cache_dtype="int8"), prompt, 1)[1]
    assert 0 < worst_error(rounded, theirs[:1]) <= 0.1


@pytest.mark.parametrize("length", [65, 200])
def test_longrope_takes_its_long_factors_where_the_context_is_long(length, tmp_path):
    model = make_model("phi3_long", original_max_position_embeddings=CONTEXT)
    prompt = make_prompt(length)
    tokens, logits = generate(make_runner(save_model(model, tmp_path)), prompt, 16)
    assert worst_error(logits, their_logits(model, prompt, tokens)) <= TOLERANCE
    short = make_model("phi3_long")
    assert worst_error(logits, their_logits(short, prompt, tokens)) > 10 * TOLERANCE


@pytest.mark.parametrize(
    ("kind", "length"),
    [
        *((kind, 200) for kind in (*KINDS, *TRANSFORMERS_KINDS, *WRITTEN_OUT_KINDS)),
        *((kind, length) for kind in ("llama", "mistral", "qwen2", "qwen3") for length in (1, 31, 700)),
    ],
)
def test_bfloat16_error_is_no_larger_than_theirs(kind, length, tmp_path):
    save_model(make_model(kind).bfloat16(), tmp_path)
    prompt = make_prompt(length)
    tokens, ours = generate(make_runner(tmp_path, dtype="bfloat16"), prompt, NUM_TOKENS)
    theirs, exact = (
        their_logits(load_model(tmp_path, dtype), prompt, tokens) for dtype in (torch.bfloat16, torch.float32)
    )
    assert (ours - exact).square().mean() <= (theirs - exact).square().mean()
    assert (ours - exact).square().mean() > 0


@pytest.mark.parametrize("chunk", [1, 16, 37])
def test_chunks_change_nothing(pair, chunk):
    _, runner = pair
    prompt = make_prompt(100)
    whole, chunked = generate(runner, prompt, 8), generate(runner, prompt, 8, chunk)
    assert whole[0] == chunked[0]
    assert torch.equal(whole[1], chunked[1])
