"""Which of Triton's kernels are launched, told apart as its compiler does, without compiling any.

    python -m helpers.launched_kernels KIND DTYPE '{"quantization": "int8"}'

Warms up a tiny model of that kind, with {"embeds": true} one that only embeds, and then runs steps of all
sorts; the last line is what was launched in either part, as JSON. A process of its own: where kernels are
interpreted, they are not compiled.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, compute_cache_key

from engine import _native
from engine.adapters.lora import LoadedAdapter
from engine.config.engine_config import EngineConfig
from engine.core import build_embedding
from engine.ops import cuda
from engine.ops.placement import on_gpu
from engine.runner.model_runner import ModelRunner
from engine.scheduling.step_plan import StepPlan, StepRow
from helpers.embedding_models import make_model as make_embedding_model
from helpers.tiny_models import make_model, save_model
from parity.driving import CONTEXT_LENGTH, make_request, make_runner

STEPS = [
    *([count] for count in (1, 2, 3, 15, 16, 17, 31, 32, 63, 64, 65, 66, 127, 129, 300)),
    [1, 1],
    [1, 5],
    [20, 1, 60],
    [1, 1, 1, 200],
]
"""Tokens of each row."""


class Driver:
    """Of a Hopper GPU that is not here."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> str:
        return "cuda"

    def get_current_stream(self, device: str) -> int:
        return 0


class NoKernels:
    """Native kernels that do nothing."""

    def __getattr__(self, name: str):
        return lambda *arguments, **options: 16


def record() -> set[str]:
    """From now on launches only note which compiled kernel they would need."""
    launched: set[str] = set()

    def note(self, *args, grid, warmup, **options):
        kernel_keys, binder = {}, self.device_caches["cuda"][-1]
        _, specialization, chosen = binder(*args, debug=False, **options)
        launched.add(f"{self.__name__} {compute_cache_key(kernel_keys, specialization, chosen)}")

    JITFunction.run = note
    driver.set_active(Driver())
    return launched


def steps(runner: ModelRunner, adapters: list) -> None:
    """Rows at the start of a text, and at the end of a long one."""
    for counts in STEPS:
        for adapter in (None, *adapters):
            for start in (0, 400):
                rows = []
                for count in counts:
                    request = make_request([5] * (start + count))
                    request = dataclasses.replace(request, num_computed=start, adapter=adapter)
                    rows.append(StepRow(request, start, count, True))
                runner.execute(StepPlan(rows))


def adapters_of(runner: ModelRunner, dtype: str) -> list[LoadedAdapter]:
    """Of the queries alone, of everything, in two ranks."""
    sites = runner.model.lora_sites()
    found = []
    for rank, chosen in ((3, sites[1:2]), (16, sites)):
        shapes = [
            (
                s.in_features,
                n == 0,
                [(p.first_column, p.num_columns, rank, 1.0) for p in s.parts if s in chosen],
            )
            for n, s in enumerate(sites)
        ]
        adapter = cuda.LoraAdapter(dtype, shapes)
        for number, (in_features, _, modules) in enumerate(shapes):
            for index, (_, columns, _, _) in enumerate(modules):
                adapter.pack(number, index, torch.zeros(rank, in_features), torch.zeros(columns, rank))
        found.append(LoadedAdapter(str(rank), rank, adapter))
    return found


def embed_texts(embedder: Any) -> None:
    """Alone and together, of all lengths."""
    for lens in (*([count] for count in (1, 2, 15, 16, 17, 33, 64, 129, 200)), [1] * 40, [7, 1, 150, 3]):
        list(embedder.compute([np.full(count, 5, np.int32) for count in lens], lens, [None] * len(lens)))


def main(kind: str, dtype: str, options: str) -> None:
    _native.cuda = NoKernels()
    chosen = json.loads(options)
    is_deterministic = chosen.pop("deterministic", False)
    context = types.SimpleNamespace(
        isa="sm_90", is_deterministic=is_deterministic, arrivals=torch.zeros(1), is_lost=False
    )
    placed = {"ops": cuda, "placement": on_gpu(dtype, "cpu")}
    with tempfile.TemporaryDirectory() as directory:
        if embeds := chosen.pop("embeds", False):
            make_embedding_model(kind).to(getattr(torch, dtype)).save_pretrained(directory)
            config = EngineConfig(model_path=directory, device="cuda", pooling="mean", dtype=dtype, **chosen)
            common = {**placed, "ctx": context, "dtype": dtype, "is_dummy": False, "progress": None}
            warmed_up = build_embedding._load(config, Path(directory), 0, common)
        else:
            save_model(make_model(kind).to(getattr(torch, dtype)), Path(directory))
            placed["context"] = context
            warmed_up = make_runner(
                Path(directory), dtype=dtype, max_draws=CONTEXT_LENGTH, **placed, **chosen
            )
    launched = record()
    warmed_up.warm_up()
    warmed = set(launched)
    if embeds:
        embed_texts(warmed_up)
    else:
        steps(warmed_up, adapters_of(warmed_up, dtype) if "max_lora_rank" in chosen else [])
    print(json.dumps({"warmed": sorted(warmed), "later": sorted(launched - warmed)}))


if __name__ == "__main__":
    np.seterr(all="ignore")
    main(*sys.argv[1:])
