"""What an engine is told to do. Every field is a choice of the user; None means "decide for me"."""

from __future__ import annotations

import dataclasses
import math

from engine.errors import ConfigError

DEVICES = ("cpu", "cuda")
DTYPES = ("auto", "bfloat16", "float16", "float32")
POOLINGS = ("mean", "cls", "last", "max")
KV_CACHE_DTYPES = ("auto", "int8", "fp8")
QUANTIZATIONS = ("none", "bf16_dot", "int8", "int4", "fp8")
SCHEDULE_POLICIES = ("fcfs", "lpm")
LOGPROBS_MODES = ("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits")
SPECULATIONS = ("off", "ngram")
LOAD_FORMATS = ("auto", "safetensors", "dummy")
PAGE_SIZES = range(16, 257, 16)
"""What the attention kernels take."""

MAX_LORA_RANK = 256

_MOST = 2**31 - 1
"""More of anything is a slip of the finger, and would not fit the messages to the engine."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Configuration of one engine. `model_path` is a directory; hub ids are resolved before this.

    Units: lengths, sizes and totals are in tokens unless the name says otherwise.
    Raises: `ConfigError` naming the flag.
    """

    model_path: str
    tokenizer_path: str | None = None
    device: str = "cpu"
    dtype: str = "auto"
    quantization: str = "none"
    kv_cache_dtype: str = "auto"
    packed_cache: str | None = None
    map_packed_cache: bool = False
    load_format: str = "auto"
    trust_remote_code: bool = False
    context_length: int | None = None
    max_total_tokens: int | None = None
    page_size: int | None = None
    max_running_requests: int | None = None
    max_queued_requests: int | None = None
    max_queued_tokens: int | None = None
    chunked_prefill_size: int | None = None
    target_itl_ms: float | None = None
    schedule_policy: str = "fcfs"
    speculative: str = "off"
    logprobs_mode: str = "raw_logprobs"
    disable_radix_cache: bool = False
    grammar_timeout: float = 5.0
    """Seconds that the compilation of a constraint may take."""

    free_json_whitespace: bool = False
    disable_jump_forward: bool = False
    num_threads: int | None = None
    cpu_isa: str | None = None
    max_loras_per_batch: int = 8
    max_loaded_loras: int = 32
    max_lora_rank: int = MAX_LORA_RANK
    mem_fraction_static: float | None = None
    """Share of the GPU's memory for weights, KV cache and the rows of a step."""
    deterministic: bool = False
    """Whether an answer must not depend on its batch on a GPU either."""
    disable_cuda_graph: bool = False
    disable_overlap_schedule: bool = False
    """Whether a step is planned when the one before is done, and not while a GPU runs it. For comparisons."""
    debug_checks: bool = False
    watchdog_timeout: float = 20.0
    """Seconds without progress after which a stuck engine process is replaced; 0: never."""
    embedding_model: str | None = None
    pooling: str | None = None
    matryoshka_dimensions: str | None = None
    allow_auto_truncate: bool = False

    def __post_init__(self) -> None:
        _one_of("--device", self.device, DEVICES)
        _one_of("--dtype", self.dtype, DTYPES)
        _one_of("--kv-cache-dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        _one_of("--quantization", self.quantization, QUANTIZATIONS)
        _one_of("--schedule-policy", self.schedule_policy, SCHEDULE_POLICIES)
        _one_of("--speculative", self.speculative, SPECULATIONS)
        _one_of("--logprobs-mode", self.logprobs_mode, LOGPROBS_MODES)
        _one_of("--load-format", self.load_format, LOAD_FORMATS)
        if self.pooling is not None:
            _one_of("--pooling", self.pooling, POOLINGS)
        if self.map_packed_cache and self.packed_cache is None:
            raise ConfigError("--map-packed-cache needs --packed-cache")
        if not self.model_path:
            raise ConfigError("--model-path must not be empty")
        for flag, value, least, most in (
            ("--context-length", self.context_length, 2, _MOST),
            ("--max-total-tokens", self.max_total_tokens, 1, _MOST),
            ("--max-running-requests", self.max_running_requests, 1, 65536),
            ("--max-queued-requests", self.max_queued_requests, 0, _MOST),
            ("--max-queued-tokens", self.max_queued_tokens, 0, _MOST),
            ("--chunked-prefill-size", self.chunked_prefill_size, 1, 65536),
            ("--num-threads", self.num_threads, 1, 1024),
            ("--max-loras-per-batch", self.max_loras_per_batch, 1, 256),
            ("--max-loaded-loras", self.max_loaded_loras, 1, 65536),
            ("--max-lora-rank", self.max_lora_rank, 1, MAX_LORA_RANK),
        ):
            if value is not None and not least <= value <= most:
                raise ConfigError(f"{flag} must be in [{least}, {most}], got {value}")
        if self.max_loaded_loras < self.max_loras_per_batch:
            raise ConfigError(
                f"--max-loaded-loras ({self.max_loaded_loras}) must be at least "
                f"--max-loras-per-batch ({self.max_loras_per_batch})"
            )
        if self.page_size is not None and self.page_size not in PAGE_SIZES:
            raise ConfigError(f"--page-size must be a multiple of 16 from 16 to 256, got {self.page_size}")
        if self.mem_fraction_static is not None and not 0.05 <= self.mem_fraction_static <= 0.99:
            raise ConfigError(
                f"--mem-fraction-static must be from 0.05 to 0.99, got {self.mem_fraction_static:g}"
            )
        if not 0 <= self.watchdog_timeout < math.inf:
            raise ConfigError(f"--watchdog-timeout must not be negative, got {self.watchdog_timeout:g}")
        if not 0 < self.grammar_timeout < math.inf:
            raise ConfigError(f"--grammar-timeout must be positive, got {self.grammar_timeout:g}")
        if self.target_itl_ms is not None and not 0 < self.target_itl_ms < math.inf:
            raise ConfigError(f"--target-itl-ms must be positive, got {self.target_itl_ms:g}")


def _one_of(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{flag} must be one of {', '.join(allowed)}, got {value!r}")
