"""What is planned of a GPU's memory is what it is asked for: counted on the CPU, with idle kernels."""

from __future__ import annotations

import dataclasses
import gc
import types

import pytest
import torch

from engine import _native
from engine.config.engine_config import EngineConfig
from engine.core import build_embedding
from engine.models.any_model import read_any_spec
from engine.ops import cuda
from engine.ops.cuda import matrix
from engine.ops.placement import on_gpu
from engine.runner import memory
from engine.runner.memory import StepBounds, step_bytes, weight_bytes
from engine.runner.model_runner import ModelRunner
from engine.scheduling.step_plan import StepPlan, StepRow
from helpers import cuda_host, triton_kernels
from helpers.allocations import Allocations
from helpers.embedding_models import make_model as make_embedding_model
from helpers.embedding_models import pooling, write_modules
from helpers.tiny_models import make_model, save_model
from parity.driving import make_request

BOUNDS = StepBounds(
    max_tokens=700, max_rows=24, max_draws=40, context_length=800, block_size=16, max_lora_rank=16
)


class NoKernels:
    """Native kernels that do nothing, and what they need for it."""

    def __init__(self) -> None:
        self._host = cuda_host.emulated()

    def __getattr__(self, name: str):
        if name in ("num_partials", "sampling_scratch_bytes"):
            return getattr(self._host, name)
        return lambda *arguments, **options: None


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setattr(_native, "cuda", NoKernels())
    assert triton_kernels.DEVICE  # imported first: in this process kernels are interpreted
    names = {
        "triton_prefill": ["prefill_attention"],
        "triton_product": ["multiply", "look_up"],
        "triton_experts": ["multiply", "add_up"],
        "triton_lora": ["shrink", "expand", "look_up"],
    }
    for module, functions in names.items():
        for name in functions:
            monkeypatch.setattr(f"engine.ops.cuda.{module}.{name}", lambda *arguments, **options: None)


class Context:
    isa, is_deterministic, is_lost = "sm_90", False, False

    def __init__(self) -> None:
        self.arrivals = torch.zeros(memory.ARRIVAL_BYTES // 4, dtype=torch.int32)


def make_runner(directory, quantization: str) -> ModelRunner:
    return ModelRunner(
        read_any_spec(directory),
        directory,
        dtype="float32",
        quantization=quantization,
        load_format="dummy",
        num_blocks=64,
        num_threads=1,
        ops=cuda,
        placement=on_gpu("float32", "cpu"),
        context=Context(),
        **dataclasses.asdict(BOUNDS),
    )


def plan(counts: list[int], start: int) -> StepPlan:
    rows = []
    for count in counts:
        request = make_request([5] * (start + count))
        rows.append(StepRow(dataclasses.replace(request, num_computed=start), start, count, True))
    return StepPlan(rows)


@pytest.mark.parametrize(
    ("kind", "quantization"),
    [("llama", "none"), ("gemma2", "none"), ("phi3", "none"), ("qwen2", "int8"), ("mixtral", "none")],
)
def test_steps_take_what_was_planned(kind, quantization, tmp_path, no_kernels):
    """float32, for in fewer bits torch makes copies for a product on a CPU that it does not make on a GPU."""
    save_model(make_model(kind), tmp_path)
    with Allocations() as allocated:
        runner = make_runner(tmp_path, quantization)
        gc.collect()
        allocated.reset_peak()
        for counts, start in (([700], 0), ([1] * 24, 750), ([20] * 24, 300)):
            runner.execute(plan(counts, start))
        runner.warm_up()
    spec = runner.spec
    weights = weight_bytes(spec, "float32" if quantization == "none" else quantization)
    parts = step_bytes(spec, BOUNDS, "float32", quantization)
    planned = weights + sum(parts.values())
    moved = BOUNDS.max_tokens * 192 * 4 if quantization == "int8" else 0
    moved += memory.expert_bytes(spec, 700, 4) // 8  # what is sorted and scored is freed before the products
    at_different_times = memory.split_bytes(spec, 24, 800) + BOUNDS.max_draws * memory.DRAW_BYTES + moved
    assert 0.97 * (planned - at_different_times) <= allocated.peak_bytes <= planned


@pytest.mark.parametrize("kind", ["bert", "modernbert", "qwen3", "gemma3_both_ways"])
def test_texts_take_what_was_planned(kind, tmp_path, no_kernels):
    """Of a model that only embeds, pooled twice; texts that see both ways are computed as a whole."""
    make_embedding_model(kind, max_position_embeddings=2048).save_pretrained(tmp_path)
    write_modules(tmp_path, pooling("weightedmean_tokens", "max_tokens"))
    config = EngineConfig(model_path=str(tmp_path), device="cuda")
    planned = build_embedding.embedding_bytes(config, str(tmp_path), 2**40)
    common = {"ops": cuda, "placement": on_gpu("float32", "cpu"), "ctx": Context(), "dtype": "float32"}
    with Allocations() as allocated:
        embedder = build_embedding._load(config, tmp_path, 0, {**common, "is_dummy": True, "progress": None})
        gc.collect()
        allocated.reset_peak()
        embedder.warm_up()
    uncounted = [layer[:2] for layer in getattr(embedder, "_kv_layers", ())]  # on a CPU not torch's
    taken = allocated.peak_bytes + sum(cache.nbytes for caches in uncounted for cache in caches)
    assert 0.8 * planned <= taken <= planned


@pytest.mark.parametrize("dtype", ["int8", "int4", "fp8", "bfloat16"])
def test_packing_a_matrix_takes_what_was_planned(dtype, monkeypatch):
    monkeypatch.setattr(matrix, "PACKED_ELEMENTS", 1 << 16)
    weight = torch.randn(1000, 1024)
    weight[:, 7] *= 100
    whole = matrix.PackedMatrix(1000, 1024, dtype)
    with Allocations() as allocated:
        packed = matrix.PackedMatrix(1000, 1024, dtype)
        if dtype == "int8":
            packed.balance_columns(None, [weight[:300], weight[300:]])
        packed.pack_rows(None, 0, weight)
    taken = allocated.peak_bytes - packed.num_bytes
    assert taken <= memory.PACKING_BYTES << 16
    monkeypatch.setattr(matrix, "PACKED_ELEMENTS", 1 << 30)
    if dtype == "int8":
        whole.balance_columns(None, [weight])
    whole.pack_rows(None, 0, weight)
    assert torch.equal(packed.stored, whole.stored) and packed.is_complete
    assert packed.scales is None or torch.equal(packed.scales, whole.scales)


def test_both_sides_mean_the_same_sizes():
    host = cuda_host.emulated()
    assert matrix.PACKED_ELEMENTS == memory.PACKED_ELEMENTS
    spec = types.SimpleNamespace(num_heads=32, head_dim=128)
    for rows, length in ((1, 257), (64, 4096), (256, 8192), (256, 131072)):
        assert 4 * host.num_partials(rows, length, 0, 32, 128) == memory.split_bytes(spec, rows, length)
    assert host.sampling_scratch_bytes(256, 128_256, 0) <= 256 * memory.DRAW_BYTES
