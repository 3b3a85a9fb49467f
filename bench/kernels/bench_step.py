"""What a decode step costs around the native ops: scheduling, inputs, arguments, messages.

    python bench/kernels/bench_step.py [--repeats 30]

The whole engine on the bundled model's shape, with ops that do nothing, so that what is left is
Python's own time (and the prefix cache's). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from engine.cache.prefix_cache import PrefixCache
from engine.config.model_location import bundled_model
from engine.core.engine_core import EngineCore
from engine.core.frames import encode_frame
from engine.core.messages import GenerateRequest, TokenChunk
from engine.models.registry import read_spec
from engine.ops import native
from engine.ops.sampling import SamplingTensors
from engine.runner.model_runner import ModelRunner
from engine.sampling.params import SamplingParams
from engine.scheduling.settings import SchedulerSettings

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import Timing, machine, report, time_calls

CONTEXT_LEN = 2048
STEPS = 20


def idle_ops() -> SimpleNamespace:
    """Ops that take any arguments and do nothing; token 0 is always drawn."""
    ops = {name: _do_nothing for name in native.__all__}
    types = {"ExecutionContext": native.ExecutionContext, "PackedMatrix": native.PackedMatrix}
    return SimpleNamespace(**{**ops, **types, "sample": _draw_nothing})


def _do_nothing(*_args: object) -> None:
    pass


def _draw_nothing(_ctx: object, tensors: SamplingTensors) -> None:
    tensors.out_ids.zero_()


def decoding_engine(num_rows: int) -> EngineCore:
    """An engine with `num_rows` requests that have computed their prompts."""
    spec = read_spec(str(bundled_model()))
    num_blocks = num_rows * CONTEXT_LEN // 16
    runner = ModelRunner(
        spec,
        "",
        dtype="bfloat16",
        num_blocks=num_blocks,
        block_size=16,
        context_length=CONTEXT_LEN,
        max_tokens=512,
        max_rows=num_rows,
        num_threads=1,
        load_format="dummy",
        ops=idle_ops(),
    )
    settings = SchedulerSettings(
        context_length=CONTEXT_LEN,
        vocab_size=spec.vocab_size,
        max_running_requests=num_rows,
        max_queued_requests=num_rows,
        chunked_prefill_size=512,
    )
    core = EngineCore(settings, runner, PrefixCache(num_blocks, 16))
    params = SamplingParams(temperature=0, max_tokens=CONTEXT_LEN - 16, ignore_eos=True)
    for row in range(num_rows):
        prompt = np.full(16, row, np.int32).tobytes()
        core.handle(GenerateRequest(f"cmpl-{row:032x}", prompt, params))
    while num_new_tokens(core) < num_rows:
        pass
    return core


def num_new_tokens(core: EngineCore) -> int:
    return sum(isinstance(message, TokenChunk) for message in core.step())


def time_steps(core: EngineCore, repeats: int) -> Timing:
    return time_calls(lambda: encode_frame(core.step()), calls=STEPS, repeats=repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    print(f"{machine()}\n\nrows   time of a step       of a row")
    results = []
    for num_rows in (1, 8, 32):
        core = decoding_engine(num_rows)
        timing = time_steps(core, args.repeats)
        assert num_new_tokens(core) == num_rows, "requests ended while they were timed"
        print(f"{num_rows:4d}   {timing}   {timing.median_us / num_rows:8.2f} µs", flush=True)
        results.append({"rows": num_rows, "us": timing.median_us, "spread": timing.spread})
    report("step", {"steps": results})


if __name__ == "__main__":
    main()
