"""AWQ, GPTQ and compressed-tensors checkpoints: the numbers of the published formulas, and P1."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import _native
from engine.errors import CheckpointError, ConfigError
from engine.ops import reference
from engine.runner.model_runner import ModelRunner
from helpers.compare import assert_same_bits
from helpers.llama_formats import q8_0, with_rounded_weights
from helpers.native import context
from helpers.quantized_checkpoints import write_quantized
from parity.driving import generate, make_request, make_runner, step_logits
from parity.test_packed_cache import logits as cached_logits
from parity.test_transformers import make_prompt, their_logits

BF16 = torch.bfloat16
CASES = {
    "awq": ("awq", {}, "int4_affine", 32),
    "awq-64": ("awq", {"group_size": 64}, "int4_affine", 32),
    "awq-128": ("awq", {"group_size": 128, "kind": "qwen2"}, "int4_affine", 128),
    "awq-gemv": ("awq-gemv", {}, "int4_affine", 32),
    "awq-gemv-64": ("awq-gemv", {"group_size": 64}, "int4_affine", 32),
    "awq-gemv-128": ("awq-gemv", {"group_size": 128, "kind": "qwen2"}, "int4_affine", 128),
    "awq-symmetric": ("awq-symmetric", {"symmetric": True}, "int4", 32),
    "gptq": ("gptq", {}, "int4_affine", 32),
    "gptq-symmetric": ("gptq", {"symmetric": True, "group_size": 128, "kind": "qwen2"}, "int4", 128),
    "gptq-bf16": ("gptq", {"symmetric": True, "dtype": BF16}, "int4_affine", 32),
    "gptq-order": ("gptq", {"order": True}, "int4_affine", 32),
    "gptq-order-symmetric": ("gptq", {"order": True, "symmetric": True, "kind": "qwen3"}, "int4", 32),
    "gptq-rows": ("gptq", {"group_size": 0}, "int4_affine", 128),
    "gptq_v2": ("gptq_v2", {"order": True}, "int4_affine", 32),
    "packed": ("pack-quantized", {"symmetric": True, "dtype": BF16}, "int4_affine", 32),
    "packed-half": ("pack-quantized", {"symmetric": True}, "int4", 32),
    "packed-zeros": ("pack-quantized", {"dtype": BF16}, "int4_affine", 32),
    "packed-order": ("pack-quantized", {"symmetric": True, "order": True}, "int4", 32),
    "packed-8": ("pack-quantized", {"bits": 8, "group_size": 0}, "int8", 128),
    "int8-rows": ("int-quantized", {"group_size": 0, "dtype": BF16}, "int8", 128),
    "int8-groups": ("int-quantized", {"group_size": 32}, "int8", 32),
}
IN_FULL = {
    "int8-zeros": ("int-quantized", {"symmetric": False}, "int8 with zero points in groups of 32"),
    "int8-rows-zeros": (
        "int-quantized",
        {"symmetric": False, "group_size": 0, "dtype": BF16, "kind": "qwen2"},
        "int8 with zero points in groups of a row",
    ),
    "packed-8-zeros": (
        "pack-quantized",
        {"bits": 8, "symmetric": False},
        "int8 with zero points in groups of 32",
    ),
    "packed-16": ("pack-quantized", {"symmetric": True, "group_size": 16}, "int4 in groups of 16"),
    "packed-48-order": (
        "pack-quantized",
        {"group_size": 48, "order": True, "dtype": BF16},
        "int4 with zero points in groups of 48",
    ),
    "int8-24": ("int-quantized", {"group_size": 24}, "int8 in groups of 24"),
    "awq-48": ("awq", {"group_size": 48}, "int4 with zero points in groups of 48"),
    "gptq-16-order": (
        "gptq",
        {"group_size": 16, "order": True},
        "int4 with zero points in groups of 16",
    ),
}
"""What no packed matrix holds."""
FEW = ("awq", "gptq-order", "packed-half", "int8-rows")


def make(tmp_path, case: str):
    method, options, *_ = CASES[case]
    return write_quantized(tmp_path / "model", method, **options), tmp_path / "model"


def unpacked(matrix) -> torch.Tensor:
    out = torch.full((matrix.out_features, matrix.in_features), float("nan"))
    _native.embedding(context("auto"), torch.arange(matrix.out_features, dtype=torch.int32), matrix, out)
    return out


@pytest.mark.parametrize("case", CASES)
def test_packed_weights_are_exactly_those_of_the_formula(tmp_path, case):
    model, directory = make(tmp_path, case)
    runner = make_runner(directory)
    dtype, group_len = CASES[case][2:]
    weights, seen = model.state_dict(), []
    slots = runner.model.slots()
    for name in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.1.self_attn.{name}.weight"
        matrix = slots[name].matrix
        if matrix not in seen:
            seen.append(matrix)
        assert (matrix.dtype, matrix.group_len) == (dtype, group_len)
    ours = torch.cat([unpacked(matrix) for matrix in seen])
    theirs = [weights[f"model.layers.1.self_attn.{name}.weight"] for name in ("q_proj", "k_proj", "v_proj")]
    assert ours.equal(torch.cat(theirs))
    assert len(seen) == (3 if "order" in case or case == "gptq_v2" else 1)
    down = slots["model.layers.2.mlp.down_proj.weight"].matrix
    assert unpacked(down).equal(weights["model.layers.2.mlp.down_proj.weight"])


@pytest.mark.parametrize("case", IN_FULL)
def test_what_does_not_map_is_dequantised_with_a_warning(tmp_path, caplog, case):
    method, options, kind = IN_FULL[case]
    model = write_quantized(tmp_path / "model", method, **options)
    runner = make_runner(tmp_path / "model", dtype="float32")
    num_matrices = 7 * model.config.num_hidden_layers
    told = f"model: {num_matrices} matrices are {kind}, which no packed format holds; they are dequantised"
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [told]
    slots, weights = runner.model.slots(), model.state_dict()
    for layer in range(model.config.num_hidden_layers):
        for name in (f"model.layers.{layer}.{part}.weight" for part in ("self_attn.o_proj", "mlp.down_proj")):
            assert slots[name].matrix.dtype == "float32"
            assert unpacked(slots[name].matrix).equal(weights[name])
    qkv = [f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv"]
    assert unpacked(slots[qkv[0]].matrix).equal(torch.cat([weights[name] for name in qkv]))
    tokens = make_prompt(40)
    ours = torch.stack(
        [step_logits(runner, request, 1) for request in [make_request(tokens)] for _ in tokens]
    )
    theirs = their_logits(model, tokens[:1], [*tokens[1:], 0])
    assert float((ours - theirs).abs().max() / theirs.std()) < 1e-4
    rounded = make_runner(tmp_path / "model", dtype="bfloat16").model.slots()[qkv[0]].matrix
    assert rounded.dtype == "bfloat16"
    assert unpacked(rounded).equal(torch.cat([weights[name].bfloat16().float() for name in qkv]))
    prompt = make_prompt(70)
    again, first = (generate(runner, prompt, 4, chunk) for chunk in (37, 512))
    assert again[0] == first[0]
    assert_same_bits(again[1], first[1])


def mixed(tmp_path, *, also=()):
    """The attention of 4 bits with groups, the MLP of 8 bits with a scale a row."""
    few = write_quantized(tmp_path / "model", "pack-quantized", symmetric=True)
    more = write_quantized(tmp_path / "more", "pack-quantized", bits=8, group_size=0)
    paths = [tmp_path / name / "model.safetensors" for name in ("model", "more")]
    tensors = [{k: v.clone() for k, v in load_file(path).items()} for path in paths]
    save_file(
        {k: v for k, v in tensors[0].items() if "mlp" not in k}
        | {k: v for k, v in tensors[1].items() if "mlp" in k},
        paths[0],
    )
    few.load_state_dict({k: v for k, v in more.state_dict().items() if "mlp" in k}, strict=False)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "more")]
    groups = [config["quantization_config"]["config_groups"]["group_0"] for config in configs]
    layout = configs[0]["quantization_config"]
    layout["format"] = "mixed-precision"
    layout["config_groups"] = {
        str(i): {**group, "targets": ["re:.*"], "format": "pack-quantized"}
        for i, group in enumerate([*groups, *also])
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps(configs[0]))
    return few, tmp_path / "model"


def test_several_config_groups_are_told_apart_by_their_tensors(tmp_path):
    model, directory = mixed(tmp_path)
    slots, weights = make_runner(directory).model.slots(), model.state_dict()
    for name, dtype in (("self_attn.o_proj", "int4"), ("mlp.down_proj", "int8")):
        name = f"model.layers.1.{name}.weight"
        assert slots[name].matrix.dtype == dtype
        assert unpacked(slots[name].matrix).equal(weights[name])


def test_config_groups_that_fit_no_matrix_or_too_many_are_refused(tmp_path):
    _, directory = mixed(
        tmp_path / "a", also=[{"weights": {"num_bits": 8, "strategy": "group", "group_size": 16}}]
    )
    assert "more than one of the config_groups" in refusal(directory)
    _, directory = mixed(tmp_path / "b")
    path = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors["model.layers.0.mlp.up_proj.weight_scale"] = torch.ones(192, 2)
    save_file(tensors, path)
    assert "model.layers.0.mlp.up_proj: none of the config_groups" in refusal(directory)


@pytest.mark.parametrize("method", ["awq", "awq-symmetric", "gptq", "pack-quantized", "int-quantized"])
def test_models_through_transformers_are_dequantised(tmp_path, caplog, method):
    options = {"order": True} if method == "gptq" else {"symmetric": method != "awq"}
    model = write_quantized(tmp_path / "model", method, kind="stablelm", **options)
    runner = make_runner(tmp_path / "model")
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 1 and "21 matrices are int" in told[0] and "they are dequantised" in told[0]
    assert runner.verdict == (True, "")
    name = "model.layers.2.mlp.down_proj.weight"
    assert unpacked(runner.model.slots()[name].matrix).equal(model.state_dict()[name])
    prompt = make_prompt(70)
    tokens, ours = generate(runner, prompt, 8)
    theirs = their_logits(model, prompt, tokens)
    assert theirs.argmax(-1).tolist() == tokens
    assert float((ours - theirs).abs().max() / theirs.std()) < 1e-4
    rounded = make_runner(tmp_path / "model", dtype="bfloat16").model.slots()[name].matrix
    assert unpacked(rounded).equal(model.state_dict()[name].bfloat16().float())


def test_a_broken_quantised_checkpoint_through_transformers_is_named(tmp_path):
    write_quantized(tmp_path, "awq", kind="stablelm")
    path = tmp_path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    del tensors["model.layers.1.mlp.up_proj.qzeros"]
    save_file(tensors, path)
    assert "lacks model.layers.1.mlp.up_proj.qzeros" in refusal(tmp_path)


def test_zero_points_that_awq_holds_count_whatever_it_says(tmp_path):
    """As for AutoAWQ's own reader."""
    model, directory = make(tmp_path, "awq")
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["zero_point"] = False
    path.write_text(json.dumps(config))
    name = "model.layers.2.mlp.down_proj.weight"
    assert unpacked(make_runner(directory).model.slots()[name].matrix).equal(model.state_dict()[name])


@pytest.mark.parametrize("case", FEW)
def test_models_are_within_the_rounding_of_activations(tmp_path, case):
    """No worse than twice what q8_0 activations do to the same weights, as for weights rounded at load."""
    model, directory = make(tmp_path, case)
    tokens = make_prompt(200)
    exact, rounded = (
        their_logits(m, tokens[:1], [*tokens[1:], 0]).double().log_softmax(-1)
        for m in (model, with_rounded_weights(model, lambda weight: weight, q8_0))
    )
    runner, request = make_runner(directory), make_request(tokens)
    ours = torch.stack([step_logits(runner, request, 1) for _ in tokens]).double().log_softmax(-1)
    theirs, mine = (float((exact.exp() * (exact - x)).sum(-1).mean()) for x in (rounded, ours))
    assert 0 < mine <= 2 * theirs


@pytest.mark.parametrize("case", FEW)
def test_the_kernels_agree_with_plain_pytorch(tmp_path, case):
    _, directory = make(tmp_path, case)
    ours, plain = (make_runner(directory, **ops) for ops in ({}, {"ops": reference}))
    errors = []
    for seed in range(5):
        logits, expected = (
            step_logits(runner, make_request(make_prompt(6 + seed)), 6) for runner in (ours, plain)
        )
        errors.append(float((logits - expected).abs().max() / expected.std()))
    assert sorted(errors)[len(errors) // 2] <= 1e-4
    assert max(errors) <= 0.5


@pytest.mark.parametrize("case", FEW)
def test_chunks_and_instruction_sets_change_nothing(tmp_path, case):
    _, directory = make(tmp_path, case)
    prompt = make_prompt(70)
    tokens, first = generate(make_runner(directory), prompt, 5)
    for isa in [isa for isa in _native.available_isas() if isa != "baseline"]:
        again = generate(make_runner(directory, isa=isa), prompt, 5, 37)
        assert again[0] == tokens
        assert_same_bits(again[1], first)


def test_the_packed_cache_keeps_the_order_of_columns(tmp_path, monkeypatch):
    _, directory = make(tmp_path, "gptq-order")
    expected = cached_logits(directory, None)
    assert torch.equal(cached_logits(directory, tmp_path / "cache"), expected)
    monkeypatch.setattr(ModelRunner, "_load", None)  # from here on the checkpoint is not read
    assert torch.equal(cached_logits(directory, tmp_path / "cache"), expected)


def test_what_is_not_quantised_follows_the_flags(tmp_path):
    _, directory = make(tmp_path, "awq")
    slots = make_runner(directory, quantization="int8").model.slots()
    assert slots["model.embed_tokens.weight"].matrix.dtype == "int8"
    assert slots["model.layers.0.self_attn.o_proj.weight"].matrix.dtype == "int4_affine"


# --- what is refused -----------------------------------------------------------------------------


def refusal(directory) -> str:
    with pytest.raises(ConfigError) as caught:
        make_runner(directory)
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("awq", {"bits": 3}, "awq with 3 bits is not supported"),
        ("awq", {"version": "marlin"}, "awq version 'marlin' is not supported"),
        ("awq", {"version": "gemv"}, r"\.(qweight|scales|qzeros) has shape .*, expected"),
        ("awq-symmetric", {"zero_point": True}, "the checkpoint lacks .*qzeros"),
        ("awq", {"group_size": 48}, r"qzeros has shape .*, expected"),
        ("int8-groups", {"config_groups": {"a": {}, "b": {}}}, "needs a config_group with weights"),
        ("awq", {"group_size": "x"}, "group_size must be an integer"),
        ("awq", {"group_size": 64}, r"qzeros has shape .*, expected"),
        (
            "awq",
            {"quant_method": "bitsandbytes"},
            "quantised by 'bitsandbytes' are not supported; supported: awq",
        ),
        ("awq", {"quant_method": None}, "quantised by None are not supported"),
        ("gptq", {"bits": 8}, "gptq with 8 bits"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ("gptq", {"sym": True}, "_proj: config.json says symmetric, but there are zero points"),
        ("gptq-order", {"desc_act": False}, "g_idx has an order of its own"),
        ("packed", {"format": "float-quantized"}, "format 'float-quantized' is not supported"),
        ("packed", {"format": "int-quantized"}, "4 bits of type 'int' are not supported"),
        ("packed", {"config_groups": {}}, "needs a config_group"),
        ("packed", {"config_groups": 7}, "needs a config_group"),
        ("int8-rows", {"format": "pack-quantized"}, "no tensor is stored so"),
    ],
)
def test_what_config_says_wrongly_is_named(tmp_path, case, change, message):
    _, directory = make(tmp_path, case)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    assert re.search(message, refusal(directory))


@pytest.mark.parametrize(
    ("case", "part", "change", "message"),
    [
        ("awq", "qzeros", None, "the checkpoint lacks model.layers.1.mlp.up_proj.qzeros"),
        ("awq", "scales", lambda t: t[:1], "up_proj.scales has shape"),
        ("awq", "qweight", lambda t: t.float(), "up_proj.qweight is F32, expected one of I32"),
        ("gptq", "g_idx", lambda t: t * 0, "up_proj: g_idx does not make groups of 32"),
        ("gptq", "g_idx", lambda t: t - 5, "up_proj: g_idx does not make groups of 32"),
        ("packed", "weight_shape", lambda t: t * 2, "up_proj: weight_shape says"),
        ("packed", "weight_shape", lambda t: -t, "up_proj: weight_shape says"),
        ("packed", "weight_shape", lambda t: t - torch.tensor([0, 1]), "up_proj: weight_shape says"),
        ("packed-order", "weight_shape", lambda t: t - torch.tensor([0, 1]), "up_proj: weight_shape says"),
        ("int8-rows", "weight", lambda t: t.half(), "up_proj.weight is F16, expected one of I8"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, case, part, change, message):
    _, directory = make(tmp_path, case)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    name = f"model.layers.1.mlp.up_proj.{part}"
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = change(tensor).contiguous()
    save_file(tensors, path)
    assert message in refusal(directory)


def test_a_bias_of_zeros_that_the_architecture_has_not_is_none(tmp_path):
    """AutoGPTQ writes one for every matrix."""
    make(tmp_path, "gptq-order-symmetric")
    directory, name = tmp_path / "model", "model.layers.1.mlp.down_proj.bias"
    expected = generate(make_runner(directory), make_prompt(9), 4)
    tensors = load_file(directory / "model.safetensors")
    save_file({**tensors, name: torch.zeros(128).half()}, directory / "model.safetensors")
    tokens, logits = generate(make_runner(directory), make_prompt(9), 4)
    assert tokens == expected[0] and logits.equal(expected[1])
    save_file({**tensors, name: torch.eye(128)[3].half()}, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"^tensor {name} is not zero, but"):
        make_runner(directory)
    save_file({**tensors, name: torch.zeros(127).half()}, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"^tensor {name} has shape"):
        make_runner(directory)


def test_a_truncated_file_is_one_line(tmp_path):
    _, directory = make(tmp_path, "awq")
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 5, 8, 100, 5000, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "model.safetensors is broken or truncated" in refusal(directory)
