"""gpt-oss checkpoints with MXFP4 experts: the numbers of transformers, held as 8-bit codes; and P1."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from engine import _native
from engine.errors import CheckpointError, ConfigError
from engine.models.coded_weight import CodedWeight
from engine.models.registry import read_spec
from engine.models.stacked_experts import mxfp4_codes
from engine.runner.memory import weight_bytes
from helpers.native import context
from helpers.tiny_models import VOCAB_SIZE, make_model, save_model
from parity.driving import generate, make_request, make_runner, step_logits


def random_blocks(num_experts: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every nibble, with scales that give weights of a usual size."""
    shape = num_experts, rows, columns // 32
    return (
        torch.randint(256, (*shape, 16), dtype=torch.uint8),
        torch.randint(122, 125, shape, dtype=torch.uint8),
    )


def numbers_of(weight: CodedWeight) -> torch.Tensor:
    return (weight.codes.double() - 128) * weight.scales.double().repeat_interleave(32, 1)


def dequantized(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """By transformers, bfloat16 [experts, rows, columns]."""
    return convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16).transpose(1, 2)


def test_every_code_and_scale_is_that_of_transformers():
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 4, 4, 16)
    for scale in range(2, 254, 4):  # 254 and 255 pass the range of bfloat16, or stand for NaN
        scales = torch.full((1, 4, 4), scale, dtype=torch.uint8)
        ours = numbers_of(mxfp4_codes(blocks[0], scales[0]))
        assert torch.equal(ours, dequantized(blocks, scales)[0].double())


@pytest.fixture
def checkpoints(tmp_path):
    """Directories of one model: experts in MXFP4, and the same numbers in bfloat16."""
    torch.manual_seed(0)
    dense = save_model(make_model("gpt_oss").bfloat16(), tmp_path / "dense")
    weights = load_file(dense / "model.safetensors")
    packed = dict(weights)
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        num_experts, columns, rows = weights[name].shape
        blocks, scales = random_blocks(num_experts, rows, columns)
        packed[f"{name}_blocks"], packed[f"{name}_scales"] = blocks, scales
        weights[name] = dequantized(blocks, scales).transpose(1, 2).contiguous()
        del packed[name]
    save_file(weights, dense / "model.safetensors")
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    mxfp4 = tmp_path / "mxfp4"
    mxfp4.mkdir()
    (mxfp4 / "config.json").write_text(json.dumps(config))
    save_file(packed, mxfp4 / "model.safetensors")
    return mxfp4, dense


def unpacked(matrix) -> torch.Tensor:
    out = torch.full((matrix.out_features, matrix.in_features), float("nan"))
    _native.embedding(context("auto"), torch.arange(matrix.out_features, dtype=torch.int32), matrix, out)
    return out


def test_experts_are_held_exactly(checkpoints):
    mxfp4, dense = (make_runner(path, dtype="bfloat16").model for path in checkpoints)
    for ours, exact in zip(mxfp4._layers, dense._layers, strict=True):
        for name in ("_gate_up", "_down"):
            pairs = zip(getattr(ours.mlp, name), getattr(exact.mlp, name), strict=True)
            for linear, expected in pairs:
                assert (linear.weight.dtype, linear.weight.group_len) == ("int8", 32)
                assert torch.equal(unpacked(linear.weight), unpacked(expected.weight))


def test_answers_are_within_the_rounding_of_activations(checkpoints):
    """Nearer to the same weights in bfloat16 than where those are rounded to 8 bits, too."""
    mxfp4, dense = checkpoints
    prompt = torch.randint(3, VOCAB_SIZE, (80,)).tolist()

    def log_shares(directory, **options) -> torch.Tensor:
        runner, request = make_runner(directory, dtype="bfloat16", **options), make_request(prompt)
        return torch.stack([step_logits(runner, request, 1) for _ in prompt]).double().log_softmax(-1)

    exact = log_shares(dense)
    ours, rounded = (
        float((exact.exp() * (exact - other)).sum(-1).mean())
        for other in (log_shares(mxfp4), log_shares(dense, quantization="int8"))
    )
    assert 0 < ours <= rounded


def test_chunks_change_nothing(checkpoints):
    prompt = torch.randint(3, VOCAB_SIZE, (70,)).tolist()
    whole, parts = (generate(make_runner(checkpoints[0]), prompt, 5, chunk) for chunk in (800, 37))
    assert whole[0] == parts[0] and torch.equal(whole[1], parts[1])


def test_invented_weights(checkpoints):
    directory, _ = checkpoints
    (directory / "model.safetensors").unlink()
    logits = generate(make_runner(directory, load_format="dummy"), [5, 6, 7], 2)[1]
    assert logits.isfinite().all() and logits.std() > 0


def test_memory_is_counted_as_it_is_held(checkpoints):
    few, many = (weight_bytes(read_spec(path), "bfloat16") for path in checkpoints)
    spec = read_spec(checkpoints[0])
    weights = spec.num_layers * spec.experts.num_experts * 3 * spec.intermediate_size * spec.hidden_size
    assert many - few == weights * (2 - 1 - 4 / 32)


def test_what_is_wrong_is_named(checkpoints):
    mxfp4, _ = checkpoints
    weights = load_file(mxfp4 / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj_scales"
    save_file({**weights, name: weights[name].to(torch.float32)}, mxfp4 / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} is F32, expected one of U8"):
        make_runner(mxfp4)
    config = json.loads((mxfp4 / "config.json").read_text())
    (mxfp4 / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ConfigError, match="quantised by .fp8. are not supported"):
        make_runner(mxfp4)
