"""A prompt of 1,024 tokens in the engine, without HTTP, against what the units that multiply can do at most.

    python bench/kernels/bench_prompt.py [--threads 2] [--format none|bf16_dot|int8|int4] [--prompts 12]

Qwen2.5-0.5B's shape with random weights. The floor is the operations of products and attention, each over the
rate of the unit that does them, measured in registers in the same run: bytes (int8, int4), pairs of bfloat16
(bf16_dot) or float32; attention multiplies float32 with --format none, else pairs of bfloat16 where that is
faster. The share is the floor divided by the median. By the clock;
with one thread by the CPU time of that thread. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from time import perf_counter_ns, thread_time_ns

import numpy as np

from engine.cache.prefix_cache import PrefixCache
from engine.core.engine_core import EngineCore
from engine.core.messages import GenerateRequest, TokenChunk
from engine.models.registry import spec_from_config
from engine.models.spec import ModelSpec
from engine.runner.model_runner import ModelRunner
from engine.sampling.params import SamplingParams
from engine.scheduling.settings import SchedulerSettings

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import machine, report
from limits import Limits

SHAPE = Path(__file__).resolve().parents[1] / "serving" / "qwen05.json"
PROMPT_LEN, CHUNK, BLOCK_SIZE = 1024, 512, 16
WARM_UP = 2


def engine(spec: ModelSpec, stored: str, num_threads: int, num_prompts: int) -> EngineCore:
    num_blocks = num_prompts * (PROMPT_LEN // BLOCK_SIZE + 1)
    runner = ModelRunner(
        spec,
        "",
        dtype="bfloat16",
        quantization=stored,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        context_length=2 * PROMPT_LEN,
        max_tokens=CHUNK,
        max_rows=1,
        num_threads=num_threads,
        load_format="dummy",
    )
    settings = SchedulerSettings(
        context_length=2 * PROMPT_LEN,
        vocab_size=spec.vocab_size,
        max_running_requests=1,
        max_queued_requests=1,
        chunked_prefill_size=CHUNK,
    )
    return EngineCore(settings, runner, PrefixCache(num_blocks, BLOCK_SIZE))


def operations(spec: ModelSpec) -> tuple[int, int]:
    """Multiplications and additions of products and of attention. Behind the last layer's attention there is
    one row, and its head, which are left out."""
    hidden, heads = spec.hidden_size, spec.num_heads * spec.head_dim
    rest = hidden * heads + 3 * hidden * spec.intermediate_size
    weights = spec.num_layers * hidden * spec.qkv_size + (spec.num_layers - 1) * rest
    seen = PROMPT_LEN * (PROMPT_LEN + 1) // 2
    return 2 * PROMPT_LEN * weights, 4 * spec.num_layers * heads * seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--format", default="int8", choices=["none", "bf16_dot", "int8", "int4"])
    parser.add_argument("--prompts", type=int, default=12)
    args = parser.parse_args()
    spec = spec_from_config(json.loads(SHAPE.read_text()))
    limits = Limits(args.threads)
    fp32 = limits.fp32_gflops()
    unit = fp32 if args.format == "none" else limits.int8_gops()
    if args.format == "bf16_dot":
        unit = limits.bf16_gflops() or fp32
    products, attention = operations(spec)
    attention_unit = fp32 if args.format == "none" else max(fp32, limits.bf16_gflops())
    floor_ms = (products / unit + attention / attention_unit) * 1e-6
    core = engine(spec, args.format, args.threads, WARM_UP + args.prompts)
    clock = thread_time_ns if args.threads == 1 else perf_counter_ns
    draw, samples = np.random.default_rng(0), []
    for index in range(WARM_UP + args.prompts):
        prompt = draw.integers(0, spec.vocab_size, PROMPT_LEN).astype(np.int32).tobytes()
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        core.handle(GenerateRequest(f"cmpl-{index:032x}", prompt, params))
        begin = clock()
        while not any(isinstance(message, TokenChunk) for message in core.step()):
            pass
        samples.append((clock() - begin) * 1e-6)
    median_ms = statistics.median(samples[WARM_UP:])
    share = floor_ms / median_ms
    rates = f"products {unit:.0f}, attention {attention_unit:.0f} Gop/s"
    print(f"{machine()}\n{args.threads} threads, {args.format}; {rates}")
    speed = f"{1e3 * PROMPT_LEN / median_ms:.0f} tokens/s, {share:.0%} of the limit"
    print(f"{median_ms:.0f} ms ({min(samples):.0f} to {max(samples):.0f}), {speed}")
    result = {"threads": args.threads, "format": args.format, "ms": median_ms, "floor_ms": floor_ms}
    report("prompt", {**result, "first_ms": samples[0], "share": share})


if __name__ == "__main__":
    main()
