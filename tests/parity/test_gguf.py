"""GGUF files: what is in few bits stays exactly as it is, and models answer as transformers does."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from engine import _native
from engine.errors import CheckpointError
from engine.models.coded_weight import CodedWeight
from engine.models.gguf_blocks import TAKE_APART
from engine.models.gguf_names import STORED
from engine.ops import reference
from helpers.compare import assert_same_bits
from helpers.gguf_files import decode, encode, random_blocks, write_gguf
from helpers.llama_formats import q8_0, with_rounded_weights
from helpers.native import context
from helpers.tiny_models import make_model
from parity.driving import generate, make_request, make_runner, step_logits
from parity.test_packed_cache import logits as cached_logits
from parity.test_transformers import TOLERANCE, make_prompt, their_greedy, their_logits, worst_error

NUM_TOKENS = 24
FLOATS = ("F32", "F16", "BF16")
LLAMA3_FACTORS = np.linspace(1, 8, 32, dtype=np.float32)


def make(kind: str, **changes):
    if kind != "llama":
        changes |= {"use_sliding_window": False}
    return make_model(kind, **changes)


def q4_k_m(name: str) -> str:
    """A mixture of types as in files that are called so."""
    return "Q6_K" if "attn_v" in name or "ffn_down" in name or "token_embd" in name else "Q4_K"


# --- blocks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STORED)
def test_packed_numbers_are_those_of_the_package(kind):
    data = random_blocks((70, 768), kind)
    weight = TAKE_APART[kind](data.reshape(70, -1, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]))
    assert isinstance(weight, CodedWeight)
    matrix = _native.PackedMatrix(70, 768, STORED[kind].dtype, STORED[kind].group_len)
    matrix.pack_codes(context("auto"), 0, weight.codes, weight.scales, weight.offsets)
    out = torch.full((70, 768), float("nan"))
    _native.embedding(context("auto"), torch.arange(70, dtype=torch.int32), matrix, out)
    assert out.equal(torch.from_numpy(decode(data, kind)))


# --- whole models ------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", FLOATS)
def test_full_precision_agrees_with_transformers(tmp_path, arch, kind):
    model = make(arch)
    runner = make_runner(write_gguf(tmp_path / "model.gguf", model, lambda name: kind))
    prompt = make_prompt(65)
    tokens, logits = generate(runner, prompt, NUM_TOKENS)
    assert tokens == their_greedy(model, prompt)[:NUM_TOKENS]
    assert worst_error(logits, their_logits(model, prompt, tokens)) <= TOLERANCE


def test_llama_without_biases_and_with_a_head_of_its_own(tmp_path):
    model = make("llama", attention_bias=False, mlp_bias=False)
    runner = make_runner(write_gguf(tmp_path / "model.gguf", model))
    prompt = make_prompt(40)
    tokens, logits = generate(runner, prompt, 8)
    assert worst_error(logits, their_logits(model, prompt, tokens)) <= TOLERANCE


def test_rotary_factors_of_llama_3_are_read(tmp_path):
    """They come as a tensor, one factor for each frequency."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "attention_factor": 1.0}
    factors = {"short_factor": LLAMA3_FACTORS.tolist(), "long_factor": LLAMA3_FACTORS.tolist()}
    options = {"attention_bias": False, "mlp_bias": False}
    plain = make("llama", **options)
    extra = {"rope_freqs.weight": LLAMA3_FACTORS}
    runner = make_runner(write_gguf(tmp_path / "model.gguf", plain, extra=extra))
    scaled = {**rope, **factors, "original_max_position_embeddings": 1024}
    model = make("llama", rope_parameters=scaled, **options)
    prompt = make_prompt(200)
    tokens, logits = generate(runner, prompt, 8)
    assert worst_error(logits, their_logits(model, prompt, tokens)) <= TOLERANCE
    assert worst_error(logits, their_logits(plain, prompt, tokens)) > 10 * TOLERANCE


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize(
    ("arch", "kinds"),
    [
        ("llama", "Q8_0"),
        ("qwen3", "Q8_0"),
        ("llama", "Q4_0"),
        ("qwen2", "Q4_0"),
        ("llama", "Q4_K"),
        ("qwen3", "Q4_K"),
        ("llama", "mixed"),
    ],
)
def test_quantised_models_are_within_the_rounding_of_activations(tmp_path, arch, kinds):
    """The weights are exact, so what remains is that activations have 8 bits: no worse than twice what
    blocks of 32 of q8_0, with which llama.cpp multiplies, do to the same weights."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 800, "head_dim": 64}
    model = make(arch, **sizes)
    path = write_gguf(tmp_path / "model.gguf", model, q4_k_m if kinds == "mixed" else lambda name: kinds)
    tokens = torch.randint(3, 800, (200,), generator=torch.Generator().manual_seed(3)).tolist()
    exact, rounded = (
        log_probabilities(their_logits(m, tokens[:1], [*tokens[1:], 0]))
        for m in (model, with_rounded_weights(model, lambda weight: weight, q8_0))
    )
    runner, request = make_runner(path), make_request(tokens)
    ours = log_probabilities(torch.stack([step_logits(runner, request, 1) for _ in tokens]))
    theirs, mine = (float((exact.exp() * (exact - x)).sum(-1).mean()) for x in (rounded, ours))
    assert 0 < mine <= 2 * theirs


@pytest.mark.parametrize("kinds", ["Q8_0", "Q4_0", "Q4_K", "mixed"])
def test_the_kernels_agree_with_plain_pytorch(tmp_path, kinds):
    """As for weights that are quantised at load: nearly all prompts agree to the last digits."""
    model = make("llama", hidden_size=256, intermediate_size=512)
    path = write_gguf(tmp_path / "model.gguf", model, q4_k_m if kinds == "mixed" else lambda name: kinds)
    ours, plain = (make_runner(path, **ops) for ops in ({}, {"ops": reference}))
    errors = []
    for seed in range(9):
        prompt = torch.randint(3, 512, (6,), generator=torch.Generator().manual_seed(seed)).tolist()
        logits, expected = (step_logits(runner, make_request(prompt), 6) for runner in (ours, plain))
        errors.append(float((logits - expected).abs().max() / expected.std()))
    assert sorted(errors)[len(errors) // 2] <= 1e-4
    assert max(errors) <= 0.5


@pytest.mark.parametrize("kinds", ["Q8_0", "Q4_0", "Q4_K", "mixed"])
def test_chunks_threads_and_instruction_sets_change_nothing(tmp_path, kinds):
    model = make("llama", hidden_size=256, intermediate_size=512)
    path = write_gguf(tmp_path / "model.gguf", model, q4_k_m if kinds == "mixed" else lambda name: kinds)
    prompt = make_prompt(100)
    tokens, first = generate(make_runner(path), prompt, 6)
    for isa in [isa for isa in _native.available_isas() if isa != "baseline"]:
        for chunk in (1, 37):
            again = generate(make_runner(path, isa=isa), prompt, 6, chunk)
            assert again[0] == tokens
            assert_same_bits(again[1], first)


def test_what_no_packed_format_holds_becomes_bfloat16_with_one_warning(tmp_path, caplog):
    model = make("llama", hidden_size=256, intermediate_size=512)
    path = write_gguf(tmp_path / "model.gguf", model, q4_k_m)
    runner = make_runner(path, dtype="bfloat16")
    # Of 32 tensors: the embedding, and v and down of three layers.
    num_tensors = len(list(model.named_parameters()))
    assert f"model.gguf: 7 of {num_tensors} tensors are Q6_K" in caplog.text
    assert caplog.text.count("no packed format") == 1
    formats = {slot.matrix.dtype for slot in runner.model.slots().values() if slot.matrix is not None}
    assert formats == {"int4_affine", "bfloat16"}


def test_the_packed_cache_keeps_them(tmp_path):
    model = make("llama", hidden_size=256, intermediate_size=512)
    path = write_gguf(tmp_path / "model.gguf", model, q4_k_m)
    expected = cached_logits(path, None)
    for _ in range(2):
        assert torch.equal(cached_logits(path, tmp_path / "cache"), expected)
    assert torch.equal(cached_logits(path, tmp_path / "cache", map_packed_cache=True), expected)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_dummy_weights_need_no_codes(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", make("llama", hidden_size=256, intermediate_size=512), q4_k_m)
    assert make_runner(path, load_format="dummy", quantization="int4").spec.stored == {}


@pytest.mark.parametrize(
    ("metadata", "extra", "message"),
    [
        (
            {},
            {"blk.0.attn_norm.extra": np.ones(4, np.float32)},
            "has tensors that this architecture does not",
        ),
        ({"llama.expert_count": 8}, {}, "mixtures of experts are not supported"),
        ({"llama.rope.scaling.type": "odd"}, {}, "rope scaling 'odd' is not supported"),
        ({"split.count": 2}, {}, "one of several parts"),
        ({"llama.rope.dimension_count": 32}, {}, "rotates 32 of 64"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, metadata, extra, message):
    path = write_gguf(tmp_path / "model.gguf", make("llama"), metadata=metadata, extra=extra)
    with pytest.raises(CheckpointError, match=message) as caught:
        make_runner(path)
    assert "\n" not in caught.value.message and caught.value.message.startswith("model.gguf: ")


@pytest.mark.parametrize("change", ["lacks", "shape", "foreign"])
def test_wrong_tensors_are_named(tmp_path, change, monkeypatch):
    model = make("llama")
    architecture = {"foreign": "mamba"}.get(change, "llama")
    if change == "lacks":
        del model.model.layers[1].mlp.up_proj.weight
    elif change == "shape":
        down = model.model.layers[1].mlp.down_proj
        down.weight = torch.nn.Parameter(down.weight[:, :64].clone())
    path = write_gguf(tmp_path / "model.gguf", model, architecture=architecture)
    message = {
        "lacks": "lacks blk.1.ffn_up.weight",
        "shape": r"tensor blk.1.ffn_down.weight has shape \[128, 64\], expected \[128, 192\]",
        "foreign": "unsupported architecture: mamba; supported: llama, qwen2, qwen3",
    }[change]
    with pytest.raises(CheckpointError, match=message):
        make_runner(path)


def test_the_helper_encodes_what_it_decodes():
    values = np.linspace(-1, 1, 512, dtype=np.float32).reshape(2, 256)
    for kind in ("F32", "F16", "BF16", "Q8_0", "Q4_0"):
        assert np.abs(decode(encode(values, kind), kind).reshape(2, 256) - values).max() < 0.08
