"""What a decode step costs around its kernels: scheduling, inputs, calls into native code, what sampling is
told, messages.

    python bench/kernels/bench_step.py [--threads 2] [--format int4] [--repeats 100]

Qwen2.5-0.5B's shape (24 layers) with random weights in the whole engine, without HTTP: the time of a step by
the clock, less what the engine's thread spends in parallel regions, which is where kernels compute. So
the weights have driven all else out of the caches, as they do when requests are served. A step is replayed
in one native call, as most are, or goes op by op, as steps with adapters and models that cannot be replayed
do. Exit status 1 where one row of a replayed step costs 0.4 ms or more. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from time import perf_counter_ns

import numpy as np

from engine.cache.prefix_cache import PrefixCache
from engine.core.engine_core import EngineCore
from engine.core.frames import encode_frame
from engine.core.garbage import spare_what_lives
from engine.core.messages import GenerateRequest, TokenChunk
from engine.models.registry import spec_from_config
from engine.runner.model_runner import ModelRunner
from engine.sampling.params import SamplingParams
from engine.scheduling.settings import SchedulerSettings

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import Timing, machine, report

SHAPE = Path(__file__).resolve().parents[1] / "serving" / "qwen05.json"
ROWS = (1, 8, 32)
CONTEXT_LEN, BLOCK_SIZE = 512, 16
WARM_UP = 5
MOST_US = 400.0


def make_runner(stored: str, num_threads: int) -> ModelRunner:
    return ModelRunner(
        spec_from_config(json.loads(SHAPE.read_text())),
        "",
        dtype="bfloat16",
        quantization=stored,
        num_blocks=max(ROWS) * CONTEXT_LEN // BLOCK_SIZE,
        block_size=BLOCK_SIZE,
        context_length=CONTEXT_LEN,
        max_tokens=512,
        max_rows=max(ROWS),
        num_threads=num_threads,
        load_format="dummy",
    )


def decoding_engine(runner: ModelRunner, num_rows: int) -> EngineCore:
    """An engine with `num_rows` requests that have computed their prompts."""
    settings = SchedulerSettings(
        context_length=CONTEXT_LEN,
        vocab_size=json.loads(SHAPE.read_text())["vocab_size"],
        max_running_requests=num_rows,
        max_queued_requests=num_rows,
        chunked_prefill_size=512,
    )
    core = EngineCore(settings, runner, PrefixCache(num_rows * CONTEXT_LEN // BLOCK_SIZE, BLOCK_SIZE))
    params = SamplingParams(temperature=0, max_tokens=CONTEXT_LEN - 16, ignore_eos=True)
    for row in range(num_rows):
        prompt = np.full(16, row, np.int32).tobytes()
        core.handle(GenerateRequest(f"cmpl-{row:032x}", prompt, params))
    while num_new_tokens(core) < num_rows:
        pass
    return core


def num_new_tokens(core: EngineCore) -> int:
    return sum(isinstance(message, TokenChunk) for message in core.step())


def around_kernels(core: EngineCore, runner: ModelRunner, repeats: int) -> tuple[Timing, Timing]:
    """Of a step: its time outside of kernels, and all of it."""
    outside, whole = [], []
    for repeat in range(WARM_UP + repeats):
        kernels_s, began_ns = runner.context.kernel_seconds[0], perf_counter_ns()
        encode_frame(core.step())
        taken_us = (perf_counter_ns() - began_ns) / 1e3
        if repeat >= WARM_UP:
            whole.append(taken_us)
            outside.append(taken_us - 1e6 * (runner.context.kernel_seconds[0] - kernels_s))
    return Timing.of(outside), Timing.of(whole)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--format", default="int4", choices=["none", "bf16_dot", "int8", "int4"])
    parser.add_argument("--repeats", type=int, default=100)
    args = parser.parse_args()
    runner = make_runner(args.format, args.threads)
    spare_what_lives()  # as the engine's process does
    can_replay = runner._replay._can_record
    print(f"{machine()}\n{args.threads} threads, {args.format}\n")
    print("rows  step         around its kernels          whole step")
    results = []
    for num_rows in ROWS:
        for way in ("replayed", "op by op"):
            runner._replay._can_record = can_replay and way == "replayed"
            core = decoding_engine(runner, num_rows)
            around, whole = around_kernels(core, runner, args.repeats)
            assert num_new_tokens(core) == num_rows, "requests ended while they were timed"
            print(f"{num_rows:4d}  {way:10} {around}   {whole}", flush=True)
            about = {"us": around.median_us, "spread": around.spread, "whole_us": whole.median_us}
            results.append({"rows": num_rows, "way": way, **about})
    holds = results[0]["us"] < MOST_US
    print(f"\n{'pass' if holds else 'FAIL'}  one row, replayed: below {MOST_US:.0f} µs\n")
    about = {"threads": args.threads, "format": args.format, "most_us": MOST_US, "reached": holds}
    report("step", {**about, "steps": results})
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
