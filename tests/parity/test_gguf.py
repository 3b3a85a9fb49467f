"""GGUF files: what is in few bits stays exactly as it is, and models answer as transformers does."""

from __future__ import annotations

import shutil

import gguf
import numpy as np
import pytest
import torch

from engine import _native
from engine.errors import CheckpointError
from engine.models.coded_weight import CodedWeight
from engine.models.gguf_blocks import TAKE_APART
from engine.models.gguf_names import STORED
from engine.models.registry import read_spec
from engine.ops import reference
from engine.runner.model_runner import ModelRunner
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
WITHOUT_BIASES = {"attention_bias": False, "mlp_bias": False}
LLAMA3_FACTORS = np.linspace(1, 8, 32, dtype=np.float32)


AS_THERE = {
    "gemma2": {"query_pre_attn_scalar": 64, "tie_word_embeddings": True},
    "gemma3": {"query_pre_attn_scalar": 64, "num_hidden_layers": 7, "layer_types": None},
    "mixtral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"use_sliding_window": False},
    "qwen3_moe": {"mlp_only_layers": []},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layer_interval": 4},
}
"""What a file cannot say otherwise, because llama.cpp knows it by the architecture."""
FAMILIES = ("gemma2", "gemma3", "granite", "mixtral", "olmo2", "phi3", "phi3_long", "qwen3_moe", "smollm3")


def make(kind: str, **changes):
    return make_model(kind, **AS_THERE.get(kind, {}), **changes)


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


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_agrees_with_transformers(tmp_path, kind):
    """In types by turns, experts of all of them included; across a window, and in chunks bit for bit."""
    model = make(kind, hidden_size=256, intermediate_size=256)
    types = {"ffn_gate": "Q8_0", "ffn_up": "F16", "attn_q": "BF16"}
    path = write_gguf(
        tmp_path / "model.gguf",
        model,
        lambda name: types.get(name.split(".")[-2].removesuffix("_exps"), "F32"),
    )
    exact = write_gguf(tmp_path / "exact.gguf", model)
    prompt = make_prompt(80)
    runner = make_runner(exact)
    tokens, logits = generate(runner, prompt, NUM_TOKENS)
    assert tokens == their_greedy(model, prompt)[:NUM_TOKENS]
    assert worst_error(logits, their_logits(model, prompt, tokens)) <= TOLERANCE
    first = generate(make_runner(path), prompt, 4)
    again = generate(make_runner(path), prompt, 4, 37)
    assert again[0] == first[0]
    assert_same_bits(again[1], first[1])
    # 8 bits of activations and of nothing else; a part in a wrong place would be far away.
    assert worst_error(first[1], their_logits(model, prompt, first[0])) <= 0.1


@pytest.mark.parametrize(("kind", "num_layers", "scalar"), [("gemma2", 46, 64), ("gemma3", 62, 64)])
def test_the_27_billion_sizes_of_gemma_scale_by_another_number(tmp_path, kind, num_layers, scalar):
    model = make(kind, hidden_size=128, intermediate_size=32)
    path = write_gguf(tmp_path / "model.gguf", model)
    assert read_spec(path).attention_scale == scalar**-0.5
    path = write_gguf(tmp_path / "large.gguf", model, metadata={f"{kind}.block_count": num_layers})
    assert read_spec(path).attention_scale == (128 / 4) ** -0.5


def test_llama_without_biases_and_with_a_head_of_its_own(tmp_path):
    model = make("llama", **WITHOUT_BIASES)
    runner = make_runner(write_gguf(tmp_path / "model.gguf", model))
    prompt = make_prompt(40)
    tokens, logits = generate(runner, prompt, 8)
    assert worst_error(logits, their_logits(model, prompt, tokens)) <= TOLERANCE


def test_rotary_factors_of_llama_3_are_read(tmp_path):
    """They come as a tensor, one factor for each frequency."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "attention_factor": 1.0}
    factors = {"short_factor": LLAMA3_FACTORS.tolist(), "long_factor": LLAMA3_FACTORS.tolist()}
    plain = make("llama", **WITHOUT_BIASES)
    extra = {"rope_freqs.weight": LLAMA3_FACTORS}
    runner = make_runner(write_gguf(tmp_path / "model.gguf", plain, extra=extra))
    scaled = {**rope, **factors, "original_max_position_embeddings": 1024}
    model = make("llama", rope_parameters=scaled, **WITHOUT_BIASES)
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


def test_the_packed_cache_keeps_them(tmp_path, monkeypatch):
    model = make("llama", hidden_size=256, intermediate_size=512)
    path = write_gguf(tmp_path / "model.gguf", model, q4_k_m)
    expected = cached_logits(path, None)
    assert torch.equal(cached_logits(path, tmp_path / "cache"), expected)
    monkeypatch.setattr(ModelRunner, "_load", None)  # from here on the file is not read
    for is_mapped in (False, True):
        assert torch.equal(cached_logits(path, tmp_path / "cache", map_packed_cache=is_mapped), expected)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_parts_are_one_model(tmp_path):
    """As llama.cpp's splitter cuts them; a changed part is another model for the packed cache."""
    whole, first = (
        write_gguf(
            tmp_path / name,
            make("llama", **WITHOUT_BIASES, hidden_size=256, intermediate_size=512),
            q4_k_m,
            tensors_a_part=count,
        )
        for name, count in (("whole.gguf", 0), ("model.gguf", 9))
    )
    parts = sorted(tmp_path.glob("model-*.gguf"))
    assert len(parts) == 4 and first == parts[0]
    expected = cached_logits(whole, None)
    for _ in range(2):
        assert torch.equal(cached_logits(first, tmp_path / "cache"), expected)
    parts[2].touch()
    assert torch.equal(cached_logits(first, tmp_path / "cache"), expected)
    assert len(list((tmp_path / "cache").iterdir())) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts[0].unlink(), "No such file"),
        (lambda parts: parts[2].unlink(), "lacks its part model-00003-of-00004.gguf"),
        (
            lambda parts: shutil.copy(parts[1], parts[2]),
            "has model-00003-of-00004.gguf beside it, which is not",
        ),
        (lambda parts: shutil.copy(parts[1], parts[0]), "is not the first of its parts; give model-00001-of"),
        (
            lambda parts: parts[3].write_bytes(parts[3].read_bytes()[:-99]),
            "model-00004-of-00004.gguf: is trunc",
        ),
        (lambda parts: parts[3].write_bytes(b"GG"), "model-00004-of-00004.gguf: is no GGUF file"),
    ],
)
def test_wrong_parts_are_named(tmp_path, change, message):
    first = write_gguf(tmp_path / "model.gguf", make("llama", **WITHOUT_BIASES), tensors_a_part=9)
    change(sorted(tmp_path.glob("model-*.gguf")))
    with pytest.raises(CheckpointError, match=message):
        make_runner(first)


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
        ({"llama.expert_count": 8}, {}, "lacks llama.expert_used_count"),
        ({"llama.expert_count": 8, "llama.expert_used_count": 2}, {}, "lacks blk.0.ffn_gate_inp.weight"),
        ({"llama.rope.scaling.type": "odd"}, {}, "rope scaling 'odd' is not supported"),
        ({"split.count": 2}, {}, "is one of 2 parts, but not called so"),
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
        "foreign": "unsupported architecture: mamba; supported: gemma2, gemma3, granite, llama",
    }[change]
    with pytest.raises(CheckpointError, match=message):
        make_runner(path)


def test_the_helper_encodes_what_it_decodes():
    values = np.linspace(-1, 1, 512, dtype=np.float32).reshape(2, 256)
    for kind in ("F32", "F16", "BF16", "Q8_0", "Q4_0"):
        assert np.abs(decode(encode(values, kind), kind).reshape(2, 256) - values).max() < 0.08
