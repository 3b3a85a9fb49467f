"""What bench/attainable.py says a machine allows, against arithmetic by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from engine.models.registry import read_spec

BENCH = Path(__file__).parents[2] / "bench"
LAYERS = 24 * (896 * 1152 + 896 * 896 + 3 * 4864 * 896)
HEAD = 896 * 151936
TOKEN_BYTES = 24 * 2 * 2 * 64 * 2
"""Of keys and values in bfloat16."""
NEVER = 1e30


def test_measuring_the_machine_leaves_arithmetic_as_it_was(monkeypatch: pytest.MonkeyPatch):
    """A library that is linked for fast mathematics makes the whole process flush subnormals."""
    monkeypatch.syspath_prepend(str(BENCH))
    import limits

    assert limits.Limits(1).fp32_gflops() > 0
    assert np.nextafter(np.float32(0), np.float32(1)) * np.float32(1) > 0


@pytest.fixture
def attainable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCH / "serving"))
    monkeypatch.syspath_prepend(str(BENCH))
    import attainable

    return attainable


@pytest.fixture
def spec(tmp_path: Path):
    config = json.loads((BENCH / "serving" / "qwen05.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    return read_spec(tmp_path)


def rates(attainable, read=NEVER, fp32=NEVER, bf16=NEVER, int8=NEVER):
    return attainable.Rates(read, {"fp32": fp32, "bf16": bf16, "int8": int8})


def limit(attainable, spec, workload: str, stored: str, **limits: float):
    import compare

    return attainable.Attainable.of(
        compare.load_workload(workload), spec, stored, rates(attainable, **limits)
    )


@pytest.mark.parametrize(("stored", "each"), [("bf16", 2), ("int8", 1 + 4 / 128), ("int4", 0.5625)])
def test_a_lone_token_takes_reading_weights_and_the_blocks_behind_it(attainable, spec, stored, each):
    found = limit(attainable, spec, "decode1", stored, read=1e9)
    blocks = sum((128 + i) // 16 * 16 for i in range(1, 128))
    seconds = 127 * (LAYERS + HEAD) * each / 1e9 + blocks * TOKEN_BYTES / 1e9
    assert found.ours == pytest.approx(127 / seconds)
    assert found.any_engine == found.ours


def test_a_prompt_takes_its_multiplications(attainable, spec):
    found = limit(attainable, spec, "prefill", "int8", int8=1e12, fp32=1e11, bf16=0)
    products = 2 * (LAYERS * 1024 + HEAD) / 1e12
    attention = 24 * 4 * 14 * 64 * (1024 * 1025 // 2) / 1e11
    assert found.ours == found.any_engine == pytest.approx(1024 / (products + attention))
    found = limit(attainable, spec, "prefill", "int8", int8=1e12, fp32=1e11, bf16=2e11)
    assert found.ours == found.any_engine == pytest.approx(1024 / (products + attention / 2))


def test_another_engine_may_take_a_faster_unit(attainable, spec):
    found = limit(attainable, spec, "prefill", "bf16", int8=NEVER, fp32=1e11, bf16=2e11)
    assert found.any_engine / found.ours == pytest.approx(2)
    ours = limit(attainable, spec, "prefill", "bf16_dot", fp32=1e11, bf16=2e11).ours
    assert found.ours < ours == found.any_engine


def test_a_step_takes_the_larger_of_both(attainable, spec):
    """16 rows at 256 tokens each: by reading alone, by multiplying alone, and not by their sum."""
    read, multiply = {"read": 1e10}, {"int8": 1e12, "fp32": 1e12}
    alone = [limit(attainable, spec, "batch16", "int8", **limits).ours for limits in (read, multiply)]
    both = limit(attainable, spec, "batch16", "int8", **read, **multiply).ours
    assert both < min(alone)
    assert 1 / both < sum(1 / one for one in alone)


@pytest.mark.parametrize(
    ("workload", "num_computed"),
    [
        ("batch16", 16 * 256),
        ("shared", 1024 + 48 * 32),  # the prefix once, and all that each has of its own
        (
            "multiturn",
            8 * (256 + 3 * (1 + 32 + 15)),
        ),  # the answer's last token, 32, a block's rest
    ],
)
def test_prompts_are_computed_as_the_scheduler_shares_them(attainable, spec, workload, num_computed):
    import asyncio

    import compare

    floor = attainable.StepFloor(spec, "int8", rates(attainable, read=1e9), "int8")
    client = attainable.FloorClient(spec, floor)
    asyncio.run(attainable.run_workload(compare.load_workload(workload), client))
    assert client.num_prompt_tokens == num_computed


def test_shared_keys_are_read_once(attainable, spec):
    found = limit(attainable, spec, "shared", "int8", read=1e9)
    alone = dataclasses.replace(spec, num_kv_heads=1)
    assert found.ours < limit(attainable, alone, "shared", "int8", read=1e9).ours
    least = (LAYERS + HEAD) * 1.03125 / 1e9
    assert 48 * 32 / found.ours < 6 * 32 * (least + (1024 + 8 * 64) * TOKEN_BYTES / 1e9) + 4 * least


def test_what_is_printed(attainable):
    found = attainable.Attainable(ours=100.0, any_engine=150.0)
    assert found.describe(50, None) == "the limits allow 100.0, of which ours is 50%"
    assert found.describe(80, ("vllm", 120)) == (
        "the limits allow 100.0, of which ours is 80%; attainable at most 1.25 times vllm, "
        "0.83 with the units that we multiply with"
    )
    same = attainable.Attainable(ours=100.0, any_engine=100.0)
    assert same.describe(90, ("llama.cpp", 80)).endswith("at most 1.25 times llama.cpp")


def test_limits_are_the_best_of_two_measurements(attainable):
    first, second = rates(attainable, read=1, fp32=4, bf16=0, int8=2), rates(attainable, read=3, fp32=2)
    assert first.best(second) == rates(attainable, read=3, fp32=4)
