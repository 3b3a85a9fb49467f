"""Nothing is compiled for a GPU after an engine is ready; its warm-up leaves no trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import ConfigError
from engine.ops.placement import on_gpu
from helpers import device_ops
from helpers.tiny_models import make_model, save_model
from parity.driving import NUM_BLOCKS, generate, make_runner
from parity.test_device_path import FakeGraphs
from parity.test_transformers import make_prompt, their_greedy

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("kind", "dtype", "options"),
    [
        ("llama", "bfloat16", {"quantization": "int8", "max_lora_rank": 16}),
        ("gpt_oss", "bfloat16", {"kv_cache_dtype": "fp8"}),
        ("gemma3", "float16", {"deterministic": True}),
        ("qwen3_moe", "bfloat16", {"quantization": "int4"}),
        ("modernbert", "bfloat16", {"embeds": True}),
        ("gemma3_both_ways", "float16", {"embeds": True, "quantization": "int8"}),
    ],
)
def test_every_kernel_that_a_step_launches_was_launched_before(kind, dtype, options):
    """By what Triton compiles a kernel for: dtypes, alignments, sizes, options."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(TESTS)])
    command = [sys.executable, "-m", "helpers.launched_kernels", kind, dtype, json.dumps(options)]
    run = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    launched = json.loads(run.stdout.splitlines()[-1])
    assert launched["warmed"] and launched["later"] == []


def test_a_warm_up_touches_no_block_and_changes_no_answer(tmp_path):
    model, told = make_model("mistral"), []
    placed = {"ops": device_ops, "placement": on_gpu("float32", "cpu"), "capture": FakeGraphs()}
    runner = make_runner(save_model(model, tmp_path), max_lora_rank=8, **placed)
    runner.warm_up(lambda stage, fraction: told.append((stage, fraction)))
    assert {stage for stage, _ in told} == {"compiling kernels"} and told[0][1] == 0 < told[-1][1] < 1
    for layer in runner.kv_cache.layers:
        assert not layer.keys[:NUM_BLOCKS].any() and not layer.values[:NUM_BLOCKS].any()
    prompt = make_prompt(80)
    assert generate(runner, prompt, 8)[0] == their_greedy(model, prompt)[:8]


def test_a_cache_that_cannot_be_written_is_said_before_service(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(13, "Permission denied", "/nowhere/.triton")

    placed = {"ops": device_ops, "placement": on_gpu("float32", "cpu")}
    runner = make_runner(save_model(make_model("llama"), tmp_path), **placed)
    monkeypatch.setattr(device_ops, "paged_attention", refuse)
    with pytest.raises(
        ConfigError, match="Permission denied: '/nowhere/.triton'; Triton needs .* TRITON_CACHE_DIR$"
    ):
        runner.warm_up()


def test_there_is_nothing_to_warm_up_on_a_cpu(tmp_path):
    runner = make_runner(save_model(make_model("llama"), tmp_path))
    runner.warm_up(lambda *told: pytest.fail("nothing is compiled"))
