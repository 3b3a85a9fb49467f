"""The least time that this machine allows for a workload, and so the most that any engine could reach.

The workload is asked of a client without a server: its requests go to our scheduler, and each step takes
what reading and multiplying take at the machine's limits, on a clock that is only counted. What a workload
shares, batches and waits for is therefore what it is in the engine, and only kernels, HTTP and Python are
left out.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent / "serving"))
from client import Completion
from limits import Limits
from workload import SEED, Workload, figures_of

from engine.cache.prefix_cache import PrefixCache
from engine.core.resolve import CHUNKED_PREFILL_SIZE, MAX_RUNNING_REQUESTS
from engine.models.spec import ModelSpec
from engine.runner.memory import WEIGHT_BYTES, block_bytes
from engine.sampling.params import SamplingParams
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.settings import SchedulerSettings
from engine.scheduling.step_plan import StepPlan, StepResult

BLOCK_SIZE, NUM_BLOCKS, CONTEXT_LENGTH = 16, 8192, 2048
STORED = {"bf16": "bfloat16", "bf16_dot": "bfloat16", "int8": "int8", "int4": "int4"}
OUR_UNIT = {"bf16": "fp32", "bf16_dot": "bf16", "int8": "int8", "int4": "int8"}
"""What our kernels multiply with, by format. Others may take any that the machine has."""
_FLOATS = ("fp32", "bf16")
ANY_UNIT = {"bf16": _FLOATS, "bf16_dot": _FLOATS, "int8": (*_FLOATS, "int8"), "int4": (*_FLOATS, "int8")}
_LOOP_TURNS = 20
"""After so many turns of the event loop whoever can ask something has asked it."""


@dataclasses.dataclass(frozen=True)
class Rates:
    """Bytes read a second, and multiplications and additions a second of each unit, all in registers."""

    read: float
    units: Mapping[str, float]

    @classmethod
    def measured(cls, num_threads: int) -> Rates:
        limits = Limits(num_threads)
        units = {"fp32": limits.fp32_gflops(), "bf16": limits.bf16_gflops(), "int8": limits.int8_gops()}
        return cls(limits.read_gbps() * 1e9, {name: rate * 1e9 for name, rate in units.items()})

    def best(self, other: Rates) -> Rates:
        """The faster of two measurements: a limit is what the machine reached at best."""
        units = {name: max(rate, other.units[name]) for name, rate in self.units.items()}
        return Rates(max(self.read, other.read), units)


class StepFloor:
    """What a step takes at least: reading weights and cached keys and values once, or the multiplications
    if that is more. Products run on `unit`, attention on another; what lies between them costs nothing."""

    def __init__(
        self, spec: ModelSpec, stored: str, rates: Rates, unit: str, attention_unit: str = "fp32"
    ) -> None:
        self._head = spec.vocab_size * spec.hidden_size
        self._layers = spec.num_parameters - self._head * (1 if spec.tie_word_embeddings else 2)
        self._bytes_each = WEIGHT_BYTES[stored]
        self._pair_ops = 4 * spec.num_layers * spec.num_heads * spec.head_dim
        self._block_bytes = block_bytes(spec, BLOCK_SIZE, "bfloat16")
        self._read, self._unit = rates.read, rates.units[unit]
        self._attention_unit = rates.units[attention_unit]

    def seconds(self, plan: StepPlan) -> float:
        num_draws, num_pairs = len(plan.draws), 0
        blocks: set[int] = set()  # what several rows share is read once
        for row in plan.rows:
            end = row.start + row.num_tokens
            num_pairs += (row.start + 1 + end) * row.num_tokens // 2
            blocks.update(row.request.block_table[: end // BLOCK_SIZE].tolist())
        num_weights = self._layers + (self._head if num_draws else 0)
        num_bytes = num_weights * self._bytes_each + len(blocks) * self._block_bytes
        products = 2 * (self._layers * plan.num_tokens + self._head * num_draws)
        attention = num_pairs * self._pair_ops
        return max(num_bytes / self._read, products / self._unit + attention / self._attention_unit)


@dataclasses.dataclass(frozen=True)
class _Answer:
    completion: Completion

    def read(self) -> Completion:
        return self.completion


class FloorClient:
    """Has the methods of `Client` that workloads use; `now_s` is the counted clock."""

    def __init__(self, spec: ModelSpec, floor: StepFloor) -> None:
        settings = SchedulerSettings(
            context_length=CONTEXT_LENGTH,
            vocab_size=spec.vocab_size,
            max_running_requests=MAX_RUNNING_REQUESTS,
            max_queued_requests=1000,
            chunked_prefill_size=CHUNKED_PREFILL_SIZE,
        )
        self.now_s = 0.0
        self.num_prompt_tokens = 0
        """That were computed, not found in the cache."""
        cache = PrefixCache(NUM_BLOCKS, BLOCK_SIZE)
        self._scheduler = Scheduler(settings, cache, clock=lambda: self.now_s)
        self._floor = floor
        self._waiting: dict[str, tuple[Completion, asyncio.Future[None]]] = {}

    async def complete(self, ids: Sequence[int], max_tokens: int) -> _Answer:
        name, over = str(len(self._waiting)), asyncio.get_running_loop().create_future()
        completion = Completion(len(ids), self.now_s, [], max_tokens, "length", [])
        self._waiting[name] = completion, over
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        self._scheduler.submit(name, np.array(ids, np.int32), params, seed=0)
        await over
        return _Answer(completion)

    def step(self) -> None:
        plan = self._scheduler.schedule()
        if plan is None:
            raise RuntimeError("the workload waits for something else than its answers")
        self.now_s += self._floor.seconds(plan)
        drawn = StepResult(np.full(len(plan.draws), 1, np.int32))
        for new in self._scheduler.update(plan, drawn):
            completion, over = self._waiting[new.request.request_id]
            completion.text_s.append(self.now_s)
            completion.token_ids_of_events.append(new.token_ids)
            if new.finish_reason is not None:
                over.set_result(None)
        self.num_prompt_tokens = self._scheduler.counters.prompt_tokens_computed


async def run_workload(workload: Workload, client: FloorClient) -> float:
    """The workload's figure."""
    asked = asyncio.ensure_future(workload.run(client, random.Random(SEED)))
    while True:
        for _ in range(_LOOP_TURNS):
            await asyncio.sleep(0)
        if asked.done():
            completions = [answer.read() for answer in asked.result()]
            return figures_of(completions, client.now_s, 0.0, None)[workload.figure]
        client.step()


@dataclasses.dataclass(frozen=True)
class Attainable:
    """Figures of a workload at the machine's limits: with the units that our kernels use, and with the
    fastest that suit the format (of attention: that multiply floating-point numbers)."""

    ours: float
    any_engine: float

    @classmethod
    def of(cls, workload: Workload, spec: ModelSpec, stored: str, rates: Rates) -> Attainable:
        """`stored`: the format, one of `STORED`."""
        fastest = [max(units, key=rates.units.__getitem__) for units in (ANY_UNIT[stored], _FLOATS)]
        ours = [OUR_UNIT[stored], "fp32" if stored == "bf16" else fastest[1]]
        floors = [StepFloor(spec, STORED[stored], rates, *units) for units in (ours, fastest)]
        return cls(*(asyncio.run(run_workload(workload, FloorClient(spec, floor))) for floor in floors))

    def describe(self, ours: float, best_rival: tuple[str, float] | None) -> str:
        """One line. `best_rival`: its name and median."""
        text = f"the limits allow {self.ours:.1f}, of which ours is {ours / self.ours:.0%}"
        if best_rival is None:
            return text
        name, theirs = best_rival
        text += f"; attainable at most {self.any_engine / theirs:.2f} times {name}"
        if self.any_engine > 1.005 * self.ours:
            text += f", {self.ours / theirs:.2f} with the units that we multiply with"
        return text
