"""gpt-oss checkpoints with MXFP4 experts answer as the same weights in bfloat16 do."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from engine.errors import CheckpointError, ConfigError
from engine.models.stacked_experts import dequantize_mxfp4
from helpers.tiny_models import VOCAB_SIZE, make_model, save_model
from parity.driving import generate, make_runner


def random_blocks(num_experts: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every nibble, with scales that give weights of a usual size."""
    shape = num_experts, rows, columns // 32
    return (
        torch.randint(256, (*shape, 16), dtype=torch.uint8),
        torch.randint(122, 125, shape, dtype=torch.uint8),
    )


def test_every_code_and_scale_is_that_of_transformers():
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 4, 4, 16)
    for scale in range(1, 254, 4):  # 254 and 255 pass the range of bfloat16, or stand for NaN
        scales = torch.full((1, 4, 4), scale, dtype=torch.uint8)
        theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16).transpose(1, 2)
        assert torch.equal(dequantize_mxfp4(blocks, scales), theirs)


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
        weights[name] = dequantize_mxfp4(blocks, scales).transpose(1, 2).contiguous()
        del packed[name]
    save_file(weights, dense / "model.safetensors")
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    mxfp4 = tmp_path / "mxfp4"
    mxfp4.mkdir()
    (mxfp4 / "config.json").write_text(json.dumps(config))
    save_file(packed, mxfp4 / "model.safetensors")
    return mxfp4, dense


def test_answers_are_those_of_the_same_weights(checkpoints):
    prompt = torch.randint(3, VOCAB_SIZE, (40,)).tolist()
    (tokens, logits), (expected, exact) = (
        generate(make_runner(path, dtype="bfloat16"), prompt, 8) for path in checkpoints
    )
    assert tokens == expected
    assert torch.equal(logits, exact)


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
