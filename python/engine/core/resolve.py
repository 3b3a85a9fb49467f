"""From what the user chose, what the model is and what the machine has, to one value for everything."""

from __future__ import annotations

import dataclasses
from typing import Any

from engine.config.engine_config import EngineConfig
from engine.core.gpu_choices import GpuBudget, check_device_flags, check_served, gpu_budget
from engine.errors import ConfigError
from engine.models.any_model import AnySpec
from engine.models.fallback.spec import TransformersSpec
from engine.runner.gpu import Gpu
from engine.runner.hardware import available_memory_bytes, usable_cores
from engine.runner.memory import (
    DEQUANTIZING_BYTES,
    StepBounds,
    block_bytes,
    blocks_that_fit,
    own_text_bytes,
    weight_bytes,
)
from engine.scheduling.settings import SchedulerSettings

PAGE_SIZE = 16
MAX_RUNNING_REQUESTS = 64
MAX_QUEUED_REQUESTS = 1024
CHUNKED_PREFILL_SIZE = 512
TARGET_ITL_MS = 500.0
MAX_STEP_DRAFTS = 64
SMALL_POOL_BYTES = 256 * 1024 * 1024
GPU_RUNNING_REQUESTS = 256
GPU_PREFILL_SIZE = 8192


@dataclasses.dataclass(frozen=True)
class Machine:
    """What resolving needs to know of the machine."""

    num_cores: int
    memory_bytes: int
    gpu: Gpu | None = None
    embedding_bytes: int = 0
    """Of the GPU, for a model of --embedding-model; on the CPU `memory_bytes` are without them."""

    @classmethod
    def this(cls, device: str = "cpu") -> Machine:
        """Raises: `ConfigError` for "cuda" without a usable GPU."""
        gpu = Gpu.this() if device == "cuda" else None
        return cls(num_cores=usable_cores(), memory_bytes=available_memory_bytes(), gpu=gpu)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedConfig:
    """Every value that an engine runs with. `reasons` tells why, for the values that nobody chose."""

    model_path: str
    device: str
    deterministic: bool
    captures_graphs: bool
    runs_ahead: bool
    load_format: str
    dtype: str
    quantization: str
    kv_cache_dtype: str
    context_length: int
    page_size: int
    max_total_tokens: int
    max_running_requests: int
    max_queued_requests: int
    max_queued_tokens: int | None
    chunked_prefill_size: int
    target_itl_ms: float
    schedule_policy: str
    disable_radix_cache: bool
    disable_jump_forward: bool
    max_step_drafts: int
    num_threads: int
    cpu_isa: str
    debug_checks: bool
    memory: str
    """Of a GPU: what of it goes where; else empty."""
    reasons: dict[str, str]

    @property
    def num_blocks(self) -> int:
        return self.max_total_tokens // self.page_size

    @property
    def max_step_draws(self) -> int:
        """Most tokens drawn in one step: one a request, and one a draft."""
        return self.max_running_requests + self.max_step_drafts

    @property
    def max_step_tokens(self) -> int:
        """Most tokens of one step: decodes come first, and prefill never gets nothing at all."""
        return _step_tokens(self.chunked_prefill_size, self.max_running_requests, self.page_size)

    def explained(self) -> dict[str, tuple[Any, str]]:
        """Value and reason of each value that was worked out; for --print-config."""
        return {name: (getattr(self, name), reason) for name, reason in self.reasons.items()}

    def scheduler_settings(self, spec: AnySpec) -> SchedulerSettings:
        return SchedulerSettings(
            context_length=self.context_length,
            vocab_size=spec.vocab_size,
            max_running_requests=self.max_running_requests,
            max_queued_requests=self.max_queued_requests,
            max_queued_tokens=self.max_queued_tokens,
            chunked_prefill_size=self.chunked_prefill_size,
            target_itl_s=self.target_itl_ms / 1e3,
            schedule_policy=self.schedule_policy,
            eos_token_ids=spec.eos_token_ids,
            jump_forward=not self.disable_jump_forward,
            max_step_drafts=self.max_step_drafts,
            runs_ahead=self.runs_ahead,
            debug_checks=self.debug_checks,
        )


def resolve(config: EngineConfig, spec: AnySpec, machine: Machine | None = None) -> ResolvedConfig:
    """Decide what was left open. Raises: `ConfigError` where choices contradict model or machine."""
    check_device_flags(config)
    machine = machine or Machine.this(config.device)
    if machine.gpu is not None:
        check_served(config, spec, machine.gpu)
    where = "on the CPU" if machine.gpu is None else "on a GPU"
    reasons: dict[str, str] = {}

    def choose(name: str, value: Any, reason: str) -> Any:
        """The user's choice, or else `value` for `reason`."""
        chosen = getattr(config, name)
        if chosen is not None and chosen != "auto":
            return chosen
        reasons[name] = reason
        return value

    page_size = choose("page_size", PAGE_SIZE, "the block of tokens that is cached and found again")
    dtype = choose("dtype", *_dtype(spec, config.device))
    kv_cache_dtype = choose("kv_cache_dtype", dtype, "that of --dtype")
    if kv_cache_dtype == "int8" and isinstance(spec, TransformersSpec) and spec.has_position_bias:
        raise ConfigError(
            f"--kv-cache-dtype int8 is not supported for {spec.architecture}, "
            "whose keys hold biases of positions"
        )
    weights = weight_bytes(spec, dtype if config.quantization == "none" else config.quantization)
    running = MAX_RUNNING_REQUESTS if machine.gpu is None else GPU_RUNNING_REQUESTS
    max_running = choose("max_running_requests", running, f"default {where}")
    prefill = CHUNKED_PREFILL_SIZE if machine.gpu is None else GPU_PREFILL_SIZE
    chunk = choose("chunked_prefill_size", prefill, f"default {where}")
    context_length = choose(
        "context_length", spec.max_position_embeddings, "the context that the model was made for"
    )
    if context_length > spec.max_position_embeddings:
        raise ConfigError(
            f"--context-length {context_length} is more than the {spec.max_position_embeddings} "
            "tokens that the model was made for"
        )
    max_drafts = 0 if config.speculative == "off" else MAX_STEP_DRAFTS
    most_tokens = max_running * -(-context_length // page_size) * page_size
    budget: GpuBudget | None = None
    embeds = config.pooling is not None and config.embedding_model is None and machine.gpu is None
    texts = own_text_bytes(spec, dtype, page_size, chunk, context_length) if embeds else 0
    if machine.gpu is None:
        left = machine.memory_bytes - min(texts, max(machine.memory_bytes - weights, 0) // 3)
        most = dataclasses.replace(machine, memory_bytes=left)
        pool = _pool_tokens(spec, kv_cache_dtype, weights, page_size, most_tokens, context_length, most)
    else:
        bounds = StepBounds(
            max_tokens=_step_tokens(chunk, max_running, page_size),
            max_rows=max_running,
            max_draws=max_running + max_drafts,
            context_length=context_length,
            block_size=page_size,
            max_lora_rank=config.max_lora_rank,
        )
        budget = gpu_budget(config, spec, machine.gpu, weights, dtype, bounds, machine.embedding_bytes)
        pool = budget.pool_tokens(most_tokens, block_bytes(spec, page_size, kv_cache_dtype), page_size)
    pool_tokens = choose("max_total_tokens", *pool)
    pool_tokens -= pool_tokens % page_size
    if pool_tokens < page_size:
        raise ConfigError(_no_room(config, dtype, weights, page_size, machine, budget))
    pool_bytes = pool_tokens // page_size * block_bytes(spec, page_size, kv_cache_dtype)
    if budget is not None and pool_bytes > budget.left_bytes:
        raise ConfigError(
            f"--max-total-tokens {config.max_total_tokens} needs {pool_bytes / 2**30:.1f} GiB, and there "
            f"are: {budget}"
        )
    is_chosen = config.max_total_tokens is not None and budget is None
    if is_chosen and weights + pool_bytes > machine.memory_bytes:
        raise ConfigError(
            f"--max-total-tokens {config.max_total_tokens} needs {pool_bytes / 2**30:.1f} GiB beside the "
            f"weights, and {machine.memory_bytes / 2**30:.1f} GiB of memory are available"
        )
    if context_length > pool_tokens:
        if config.context_length is not None:
            raise ConfigError(
                f"--context-length {context_length} does not fit the KV cache of {pool_tokens} tokens; "
                "lower it, or set --max-total-tokens"
            )
        context_length = pool_tokens
        reasons["context_length"] = "the size of the KV cache, which is smaller than the model's context"
    if budget is None:
        texts = own_text_bytes(spec, dtype, page_size, chunk, context_length) if embeds else 0
        _check_fits(spec, machine.memory_bytes, weights, pool_bytes, texts)
    return ResolvedConfig(
        model_path=config.model_path,
        device=config.device,
        deterministic=config.deterministic,
        captures_graphs=config.device == "cuda" and not config.disable_cuda_graph,
        runs_ahead=config.device == "cuda"
        and config.speculative == "off"
        and not config.disable_overlap_schedule,
        load_format=config.load_format,
        dtype=dtype,
        quantization=config.quantization,
        kv_cache_dtype=kv_cache_dtype,
        context_length=context_length,
        page_size=page_size,
        max_total_tokens=pool_tokens,
        max_running_requests=max_running,
        max_queued_requests=choose(
            "max_queued_requests", MAX_QUEUED_REQUESTS, "default; bounds the memory of a flood"
        ),
        max_queued_tokens=config.max_queued_tokens,
        chunked_prefill_size=chunk,
        target_itl_ms=choose("target_itl_ms", TARGET_ITL_MS, f"default {where}"),
        schedule_policy=config.schedule_policy,
        disable_radix_cache=config.disable_radix_cache,
        disable_jump_forward=config.disable_jump_forward,
        max_step_drafts=max_drafts,
        num_threads=choose(
            "num_threads", machine.num_cores, "cores that the affinity mask and the cgroup leave us"
        ),
        cpu_isa=choose("cpu_isa", "auto", "the best that the machine has"),
        debug_checks=config.debug_checks,
        memory="" if budget is None else str(budget),
        reasons=reasons,
    )


def _step_tokens(chunk: int, max_running: int, page_size: int) -> int:
    return max(chunk, max_running + min(page_size, chunk))


def _dtype(spec: AnySpec, device: str) -> tuple[str, str]:
    if spec.dtype == "float16" and device == "cpu":
        return "float32", "the checkpoint is float16, which float32 keeps exactly"
    return spec.dtype, "that of the checkpoint"


def _pool_tokens(
    spec: AnySpec,
    kv_cache_dtype: str,
    weights: int,
    page_size: int,
    most_tokens: int,
    context_length: int,
    machine: Machine,
) -> tuple[int, str]:
    """KV tokens and why: modest, but one whole context if half of the memory that is left allows it."""
    one_block = block_bytes(spec, page_size, kv_cache_dtype)
    half_left = max(machine.memory_bytes - weights, 0) // 2
    one_context = -(-context_length // page_size) * one_block
    wanted = max(SMALL_POOL_BYTES, weights, one_context)
    blocks = blocks_that_fit(spec, page_size, kv_cache_dtype, min(wanted, half_left))
    if blocks * page_size >= most_tokens:
        return most_tokens, "a whole context for each running request"
    megabytes = blocks * one_block // 2**20
    if half_left < wanted:
        return blocks * page_size, f"{megabytes} MB: half of the memory that the weights leave"
    why = {SMALL_POOL_BYTES: "a small share of memory", one_context: "one whole context"}
    return blocks * page_size, f"{megabytes} MB: {why.get(wanted, 'as much as the weights')}"


def _check_fits(spec: AnySpec, memory_bytes: int, weights: int, pool: int, texts: int) -> None:
    """Raises: `ConfigError` for what is needed beside weights and pool: texts to embed, and while loading."""
    gib = 2**30
    loading = DEQUANTIZING_BYTES * spec.largest_dequantized
    if texts and weights + pool + texts > memory_bytes:
        raise ConfigError(
            f"--pooling needs {texts / gib:.1f} GiB for texts beside weights and KV cache of "
            f"{(weights + pool) / gib:.1f} GiB, and {memory_bytes / gib:.1f} GiB of memory are available; "
            "lower --context-length, --chunked-prefill-size or --max-total-tokens"
        )
    if weights + loading > memory_bytes:
        raise ConfigError(
            f"the model does not fit: dequantising its largest matrix takes {loading / gib:.1f} GiB beside "
            f"weights of {weights / gib:.1f} GiB, and {memory_bytes / gib:.1f} GiB of memory are available"
        )


def _no_room(
    config: EngineConfig,
    dtype: str,
    weights: int,
    page_size: int,
    machine: Machine,
    budget: GpuBudget | None,
) -> str:
    if config.max_total_tokens is not None:
        return f"--max-total-tokens {config.max_total_tokens} is less than one block of {page_size} tokens"
    if budget is not None:
        return f"the model does not fit {budget.name}: {budget}"
    return (
        f"the model does not fit: its weights take {weights / 2**30:.1f} GiB as "
        f"{dtype if config.quantization == 'none' else config.quantization}, "
        f"and {machine.memory_bytes / 2**30:.1f} GiB of memory are available"
    )
