"""A loaded model with its cache: runs one step plan at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from engine.adapters.lora import AdapterReader
from engine.models.any_model import AnyModel, AnySpec, build_model
from engine.models.decoder import DecoderInputs
from engine.models.packed_cache import PackedCache, cache_key
from engine.models.spec import ModelSpec
from engine.models.weights import Progress, Slot, load_dummy
from engine.ops.placement import CPU, Placement
from engine.runner.batch_inputs import BatchInputs
from engine.runner.decode_graphs import Capture, DecodeGraphs
from engine.runner.decode_replay import DecodeReplay
from engine.runner.device_inputs import DeviceInputs
from engine.runner.gpu import raise_if_lost
from engine.runner.kv_cache import KVCache
from engine.runner.memory import graph_bytes
from engine.runner.pages_ahead import PagesAhead
from engine.runner.self_check import check_batches
from engine.runner.warm_up import WarmUp, compiling
from engine.sampling.drawn_ids import LateIds
from engine.sampling.sampler import Sampler
from engine.sampling.token_scorer import TokenScorer
from engine.scheduling.step_plan import StepPlan, StepResult, Wait

logger = logging.getLogger(__name__)


class ModelRunner:
    """Implements `scheduling.step_plan.Runner`, on the CPU unless `placement` says otherwise.

    `dtype` is that of weights and, unless `kv_cache_dtype` says "int8" or "fp8", of the cache; `quantization`
    other than "none" stores weights in fewer bits. `max_tokens` and `max_rows`
    bound a step, `max_draws` (as many as rows unless told) what it draws, `context_length` the known tokens
    of a request. `ops` is `engine.ops.native`, or `engine.ops.cuda`, or in tests `engine.ops.reference`, and
    `context` its execution context, made here unless it is given. `capture` records decode steps on a GPU.
    `packed_cache` is a directory that keeps packed weights, `map_packed_cache` leaves them in its files.
    Raises: `ConfigError` or `CheckpointError` when the model cannot be loaded; `DeviceLost` from a step after
    which the GPU does nothing more for this process.
    """

    def __init__(
        self,
        spec: AnySpec,
        model_path: str | Path,
        *,
        dtype: str,
        num_blocks: int,
        block_size: int,
        context_length: int,
        max_tokens: int,
        max_rows: int,
        max_draws: int | None = None,
        num_threads: int,
        isa: str = "auto",
        load_format: str = "auto",
        logprobs_mode: str = "raw_logprobs",
        max_lora_rank: int = 0,
        quantization: str = "none",
        kv_cache_dtype: str = "auto",
        packed_cache: str | None = None,
        map_packed_cache: bool = False,
        progress: Progress | None = None,
        ops: ModuleType | None = None,
        placement: Placement = CPU,
        context: Any = None,
        capture: Capture | None = None,
    ) -> None:
        ops = ops or _native_ops()
        max_draws = max_draws or max_rows
        self.context: Any = context or ops.ExecutionContext(
            num_threads=num_threads, isa=isa, rounds_attention=quantization != "none"
        )
        if load_format == "dummy" and isinstance(spec, ModelSpec):
            spec = spec.in_full()
        self.spec = spec
        with placement.making():
            self._model = build_model(
                spec,
                model_path,
                dtype,
                ops=ops,
                ctx=self.context,
                max_tokens=max_tokens,
                max_rows=max_draws,
                num_positions=context_length,
                max_lora_rank=max_lora_rank,
                quantization=quantization,
                placement=placement,
            )
        sites = self._model.lora_sites()
        self.adapter_reader = (
            AdapterReader(
                sites, model_path, dtype=dtype, max_rank=max_lora_rank, ops=ops, placement=placement
            )
            if sites
            else None
        )
        """None for a model that takes no adapters."""

        if packed_cache is None:
            self._load(model_path, load_format, self._model.slots(), progress)
        else:
            formats = {"load_format": load_format, "dtype": dtype, "quantization": quantization}
            key = cache_key(spec, model_path, **formats)
            cache = PackedCache(packed_cache, key, is_mapped=map_packed_cache)
            if not cache.load(self.context, self._model.slots()):
                slots, small = cache.recording(self._model.slots())
                self._load(model_path, load_format, slots, progress)
                cache.save(self.context, slots, small)
                if map_packed_cache:  # not only from the next start on
                    cache.load(self.context, self._model.slots())
        self.verdict = check_batches(self._model, spec, quantization)
        self.kv_cache = KVCache(
            spec,
            num_blocks=num_blocks if placement.is_host else num_blocks + 1,
            block_size=block_size,
            dtype=_cache_dtype(dtype if kv_cache_dtype == "auto" else kv_cache_dtype),
            placement=placement,
        )
        self._pages: PagesAhead | None = None
        if placement.is_host:
            caches = [tensor for layer in self.kv_cache.layers for tensor in (layer.keys, layer.values)]
            self._pages = PagesAhead(caches, block_size)
        self._inputs = BatchInputs(
            max_tokens=max_tokens, max_rows=max_rows, max_positions=context_length, block_size=block_size
        )
        self._replay = DecodeReplay(self._model.forward, self.kv_cache.layers, self.context)
        self._graphs: DecodeGraphs | None = None
        self._warm_up: WarmUp | None = None
        if not placement.is_host:
            spare = num_blocks  # behind those that the scheduler gives away
            device_inputs = DeviceInputs(placement.device, block_size=block_size, spare_block=spare)
            self._graphs = DecodeGraphs(
                self._model.forward,
                self.kv_cache.layers,
                device_inputs,
                max_rows=max_rows,
                context_length=context_length,
                device=placement.device,
                capture=None if self._model.waits_for_device else capture,
                max_bytes=graph_bytes(spec, max_rows, context_length, placement.activations.itemsize),
            )
            self._warm_up = WarmUp(
                ops=ops,
                placement=placement,
                inputs=device_inputs,
                dtype=dtype,
                sites=sites if max_lora_rank else (),
                spec=spec,
                max_tokens=max_tokens,
                max_logits=max_draws,
                context_length=context_length,
            )
        self._sampler = Sampler(
            ops,
            self.context,
            spec.vocab_size,
            max_draws,
            logprobs_mode=logprobs_mode,
            placement=placement,
        )
        self._scorer = TokenScorer(
            ops,
            self.context,
            self._model.project,
            max_draws,
            vocab_size=spec.vocab_size,
            logprobs_mode=logprobs_mode,
        )

    def _load(
        self, model_path: str | Path, load_format: str, slots: dict[str, Slot], progress: Progress | None
    ) -> None:
        if load_format == "dummy":
            load_dummy(slots, progress=progress)
        else:
            self._model.load(model_path, slots, progress)

    def warm_up(self, progress: Progress | None = None) -> None:
        """Launch what steps may need, which compiles it, on a GPU; on the CPU there is nothing to do.

        Raises: `ConfigError` where nothing can be compiled; torch's own error where the largest step finds
        too little memory.
        """
        if self._warm_up is None or self._graphs is None:
            return
        began_s = time.monotonic()
        steps = self._warm_up.steps()
        for done, inputs in enumerate(steps):
            if progress is not None:
                progress("compiling kernels", done / len(steps))
            with compiling():
                self._model.project(self._graphs.launch(inputs)).sum().item()  # waits for all of it
            self._model.end_step()
        logger.info("kernels compiled, or found in Triton's cache, in %.1f s", time.monotonic() - began_s)

    def capture_next(self) -> bool:
        """Use a moment in which nothing else is to do for a CUDA graph; whether there was one to capture."""
        return self._graphs is not None and self._graphs.capture_next()

    @property
    def model(self) -> AnyModel:
        """The decoder, for other users of its weights between steps."""
        return self._model

    def execute(self, plan: StepPlan) -> StepResult:
        """Launch a step and wait for it."""
        return self.launch(plan)()

    def launch(self, plan: StepPlan, before_draws: Callable[[], None] | None = None) -> Wait:
        """Compute the plan's tokens, fill their slots, score known tokens, and draw new ones.

        On a GPU nothing here waits for it.
        """
        try:
            hidden, num_scored = self._compute(plan)
            num_sampled = hidden.shape[0] - num_scored
            sampled = hidden if num_scored == 0 else hidden[:num_sampled]  # a cut costs 20 us and more
            logits = self._model.project(sampled)
            if before_draws is not None:
                before_draws()
            drawn = self._sampler.launch(logits, plan)
            scored = None
            if num_scored:
                scored = self._scorer.launch(hidden[num_sampled:], plan.scored_rows, num_sampled)
        except Exception as error:
            raise_if_lost(self.context, error)
            raise
        finally:
            self._model.end_step()

        def wait() -> StepResult:
            try:
                result = drawn()
                result.scores = () if scored is None else scored()
            except Exception as error:
                raise_if_lost(self.context, error)
                raise
            return result

        return wait

    def compute_logits(self, plan: StepPlan) -> torch.Tensor:
        """Logits float32 [R, V] of the sampled rows, valid until the next step."""
        hidden, num_scored = self._compute(plan)
        return self._model.project(hidden[: len(hidden) - num_scored])

    def _compute(self, plan: StepPlan) -> tuple[torch.Tensor, int]:
        inputs = self._inputs.build(plan)
        if self._pages is not None:
            self._pages.reach(self._inputs.last_slot_id)
        if self._graphs is not None:
            return self._graphs.run(inputs, self._late_ids(plan, inputs)), inputs.num_scored
        return self._replay.run(inputs), inputs.num_scored

    def _late_ids(self, plan: StepPlan, inputs: DecoderInputs) -> LateIds | None:
        """The tokens of rows that are ahead."""
        rows = [index for index, row in enumerate(plan.rows) if row.is_ahead]
        ends = inputs.plan.cu_seqlens_q.numpy()[1:]
        return self._sampler.drawn.late([plan.rows[index].request for index in rows], ends[rows] - 1)


def _cache_dtype(name: str) -> torch.dtype:
    return torch.float8_e4m3fn if name == "fp8" else getattr(torch, name)


def _native_ops() -> ModuleType:
    from engine.ops import native  # late: the module may be absent where only the reference is used

    return native
