"""Compiles the Triton kernels for GPUs that need not be here, and prints what they take of them.

    python bench/kernels/report_triton.py --isa sm_90 sm_80

A kernel is compiled as it is launched: by the functions of `engine.ops.cuda`, on tensors of the CPU, with a
driver in the place of CUDA's that only says which GPU it is. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import subprocess
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # read where a kernel is defined

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from engine.ops.cuda.lookup import embedding
from engine.ops.cuda.low_rank import LoraAdapter, LoraPlan, lora, lora_embedding
from engine.ops.cuda.matrix import PackedMatrix, linear
from engine.ops.cuda.mixture import ExpertMatrices, experts
from engine.ops.cuda.plan import DevicePlan
from engine.ops.cuda.triton_prefill import prefill_attention

BF16 = torch.bfloat16


class Driver:
    """Of a GPU that is not here."""

    def __init__(self, isa: str) -> None:
        self._target = GPUTarget("cuda", int(isa.removeprefix("sm_")), 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return f"sm_{self._target.arch}"  # kernels are kept by device

    def get_current_stream(self, device: str) -> int:
        return 0


@dataclasses.dataclass(frozen=True)
class Usage:
    """Of one kernel; `spilled_bytes` is the local memory of a thread."""

    kernel: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    products: str


@contextlib.contextmanager
def compiled_only(isa: str) -> Iterator[list]:
    """Kernels are compiled for `isa` where they would be launched."""
    kernels: list = []
    run = JITFunction.run
    active = driver._active

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = compile_only
    driver.set_active(Driver(isa))
    try:
        yield kernels
    finally:
        JITFunction.run = run
        driver._active = active


def usage(kernel) -> Usage:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", shown)
    assert found, shown
    registers, stack, local = map(int, found.groups())
    products = [name for name in ("wgmma", "mma.sync") if f"{name}." in kernel.asm["ptx"]]
    return Usage(kernel.metadata.name, registers, stack + local, kernel.metadata.shared, " ".join(products))


def cases(isa: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """What a Llama of 8 billion parameters launches, and the features that it lacks."""
    ctx = types.SimpleNamespace(isa=isa, is_deterministic=False)
    exact = types.SimpleNamespace(isa=isa, is_deterministic=True)
    for head_dim in (64, 128, 256):
        yield f"prefill, head dim {head_dim}", lambda d=head_dim: prefill(ctx, d)
    yield "prefill, head dim 128, fp8 cache", lambda: prefill(ctx, 128, is_coded=True)
    yield "prefill, head dim 128, window, soft cap, sinks", lambda: prefill(ctx, 128, has_all=True)
    for head_dim in (16, 32, 64):  # of encoders
        yield f"texts, head dim {head_dim}", lambda d=head_dim: prefill(ctx, d, is_causal=False)
    yield "texts, head dim 64, window", lambda: prefill(ctx, 64, window=32, is_causal=False)
    yield "texts, head dim 64, float32", lambda: prefill(ctx, 64, is_causal=False, dtype=torch.float32)
    for dtype, group_len in (("int8", 128), ("int4", 32), ("int4", 128), ("int4_affine", 32), ("fp8", 0)):
        for num_rows in (16, 64, 4096):
            name = f"{dtype} weights, groups of {group_len}" if group_len else f"{dtype} weights"
            yield f"{name}, {num_rows} rows", lambda a=(dtype, group_len, num_rows): product(ctx, *a)
    for dtype, group_len in (("bfloat16", 0), ("int8", 32), ("int4", 32)):
        for num_rows in (16, 64, 4096):  # of each expert
            name = f"experts of {dtype}, {num_rows} rows"
            yield name, lambda a=(dtype, group_len, num_rows): mixture(ctx, *a)
    yield "experts, deterministic", lambda: mixture(exact, "bfloat16", 0, 16)
    yield "prefill and decode, deterministic", lambda: prefill(exact, 128)
    yield "bfloat16 weights, deterministic", lambda: product(exact, "bfloat16", 0, 64)
    yield "int8 weights, deterministic", lambda: product(exact, "int8", 128, 64)
    yield "adapters", lambda: adapters(ctx)
    yield (
        "embedding of int4 weights",
        lambda: embedding(ctx, torch.zeros(8).int(), matrix("int4", 32), rows(8)),
    )


def rows(count: int, columns: int = 4096) -> torch.Tensor:
    return torch.zeros(count, columns, dtype=BF16)


def matrix(dtype: str, group_len: int) -> PackedMatrix:
    made = PackedMatrix(4096, 4096, dtype, group_len)
    made.is_complete = True
    return made


def product(ctx, dtype: str, group_len: int, num_rows: int) -> None:
    linear(ctx, rows(num_rows), matrix(dtype, group_len), torch.zeros(4096), rows(num_rows))


def mixture(ctx, dtype: str, group_len: int, num_rows: int, num_experts: int = 8) -> None:
    """All products of a layer; of a tile for each number of rows."""
    matrices = ExpertMatrices([matrix(dtype, group_len)] * num_experts, [torch.zeros(4096)] * num_experts)
    ids = torch.arange(num_rows * num_experts)[:, None] % num_experts
    x = rows(len(ids))
    experts(ctx, x, torch.ones(ids.shape), ids, matrices, lambda inner, product: None, matrices, x)


def prefill(
    ctx,
    head_dim: int,
    *,
    is_coded: bool = False,
    has_all: bool = False,
    window: int = 0,
    is_causal: bool = True,
    dtype: torch.dtype = BF16,
) -> None:
    """Four query heads share keys, but for encoders."""
    kv_heads, heads, num_queries = 2 if is_causal else 8, 8, 64
    cache = torch.zeros(8, kv_heads, 16, head_dim, dtype=torch.float8_e4m3fn if is_coded else dtype)
    q = rows(num_queries, heads * head_dim).to(dtype).unflatten(1, (heads, head_dim))
    plan = DevicePlan(
        torch.tensor([0, num_queries]).int(),
        torch.tensor([128]).int(),
        torch.zeros(1, 8).int(),
        is_causal,
        decode_rows=torch.zeros(1).int(),
        tiles=torch.zeros(1, 2).int(),
        max_decode_kv_len=0,
        max_kv_len=128,
    )
    numbers = (32, 30.0) if has_all else (window, 0.0)
    sinks = torch.zeros(heads) if has_all else None
    scales = torch.zeros(8, kv_heads, 2, 16) if is_coded else None
    prefill_attention(ctx, q, cache, cache, plan, 0.1, *numbers, q, sinks, scales)


def adapters(ctx) -> None:
    """All three kernels."""
    adapter = LoraAdapter(
        "bfloat16", [(4096, False, [(0, 4096, 16, 1.0)]), (1000, True, [(0, 4096, 16, 1.0)])]
    )
    adapter.pack(0, 0, torch.zeros(16, 4096), torch.zeros(4096, 16))
    adapter.pack(1, 0, torch.zeros(16, 1000), torch.zeros(4096, 16))
    plan = LoraPlan([adapter], torch.tensor([0, 8]).int(), torch.arange(8).int())
    lora(ctx, rows(8), 0, plan, torch.zeros(128), rows(8))
    lora_embedding(ctx, torch.zeros(8).int(), 1, plan, torch.zeros(128), rows(8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--isa", nargs="+", default=["sm_80", "sm_90"])
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose names begin so")
    arguments = parser.parse_args()
    found: dict[str, list[dict]] = {}
    for isa in arguments.isa:
        columns = isa, "kernel", "registers", "spilled bytes", "shared KiB", "products"
        print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
        for name, launch in cases(isa):
            if not name.startswith(tuple(arguments.only)):
                continue
            with compiled_only(isa) as kernels:
                launch()
            for kernel in {id(kernel): kernel for kernel in kernels}.values():
                use = usage(kernel)
                found.setdefault(isa, []).append({"case": name, **dataclasses.asdict(use)})
                sizes = f"{use.registers} | {use.spilled_bytes} | {use.shared_bytes / 1024:.0f}"
                print(f"| {name} | {use.kernel} | {sizes} | {use.products} |", flush=True)
    print(json.dumps({"triton": triton.__version__, "kernels": found}))


if __name__ == "__main__":
    main()
