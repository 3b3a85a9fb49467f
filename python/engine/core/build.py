"""From a configuration to an engine that can take requests."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from engine.config.engine_config import EngineConfig
from engine.config.model_location import locate_model
from engine.core.build_adapters import build_adapters
from engine.core.build_embedding import (
    beside_embedding,
    build_embedding_engine,
    embedder_beside,
    only_embeds,
)
from engine.core.cpu_clock import CpuClock
from engine.core.embedding_core import EmbeddingCore
from engine.core.engine_core import EngineCore
from engine.core.gpu_choices import FOLLOWS_BATCH
from engine.core.messages import EngineReady
from engine.core.resolve import Machine, ResolvedConfig, resolve
from engine.core.step_board import StepBoard
from engine.errors import ConfigError
from engine.grammar.compiler import GrammarCompiler
from engine.models.any_model import read_any_spec
from engine.models.spec import ModelSpec

logger = logging.getLogger(__name__)
Progress = Callable[[str, float], None]
OUT_OF_MEMORY = ("allocate memory", "out of memory")


def build_engine(
    config: EngineConfig, progress: Progress | None = None, board: StepBoard | None = None
) -> tuple[EngineCore, EngineReady]:
    """Find the model, load it, and wire the engine together.

    `progress` is told the stage and how far it is, 0 to 1. `board` is kept for the supervisor.
    Raises: `ConfigError` or `CheckpointError`, one line, when it cannot be done.
    Effects: may download a model that is named by a hub id; imports torch.
    """
    directory = str(locate_model(config.model_path, with_code=config.trust_remote_code))
    config = dataclasses.replace(config, model_path=directory)
    if only_embeds(directory):
        return build_embedding_engine(config, progress, board)
    spec = read_any_spec(directory, trusts_remote_code=config.trust_remote_code)
    machine = Machine.this(config.device)
    if config.embedding_model is not None:
        embedding_directory = str(locate_model(config.embedding_model))
        machine = beside_embedding(config, embedding_directory, machine)
    resolved = resolve(config, spec, machine)
    if resolved.memory:
        logger.info("memory of the GPU: %s", resolved.memory)

    if config.device == "cuda" and resolved.max_step_drafts:
        logger.info(
            "--speculative %s guesses from tokens that are known: steps wait for the one before",
            config.speculative,
        )

    # Late: torch takes seconds to import, and a wrong path is told at once.
    from engine._native import ProgressBoard
    from engine.cache.prefix_cache import PrefixCache
    from engine.ops.placement import CPU
    from engine.runner.model_runner import ModelRunner

    device = on_device(resolved)
    try:
        runner = ModelRunner(
            spec,
            directory,
            dtype=resolved.dtype,
            num_blocks=resolved.num_blocks,
            block_size=resolved.page_size,
            context_length=resolved.context_length,
            max_tokens=resolved.max_step_tokens,
            max_rows=resolved.max_running_requests,
            max_draws=resolved.max_step_draws,
            num_threads=resolved.num_threads,
            isa=resolved.cpu_isa,
            load_format=resolved.load_format,
            logprobs_mode=config.logprobs_mode,
            max_lora_rank=config.max_lora_rank,
            quantization=resolved.quantization,
            kv_cache_dtype=resolved.kv_cache_dtype,
            packed_cache=config.packed_cache,
            map_packed_cache=config.map_packed_cache,
            progress=progress,
            **device,
        )
        runner.warm_up(progress)
        embedder = embedder_beside(config, runner, resolved, device.get("placement", CPU))
    except (MemoryError, RuntimeError) as error:  # torch says the latter
        if isinstance(error, RuntimeError) and not any(text in str(error) for text in OUT_OF_MEMORY):
            raise
        raise ConfigError(
            "there is not enough memory for the model and its workspaces; lower "
            f"--max-running-requests ({resolved.max_running_requests}), "
            f"--chunked-prefill-size ({resolved.chunked_prefill_size}) or "
            f"--max-total-tokens ({resolved.max_total_tokens})"
            + (f"; planned was: {resolved.memory}" if resolved.memory else "")
        ) from error
    if board is not None:
        runner.context.report_to(ProgressBoard(board.fd))
    cache = PrefixCache(resolved.num_blocks, resolved.page_size, enabled=not resolved.disable_radix_cache)
    adapters, adapter_queue = build_adapters(config, runner.adapter_reader)
    grammars = GrammarCompiler(
        str(locate_model(config.tokenizer_path)) if config.tokenizer_path else directory,
        spec.vocab_size,
        timeout_s=config.grammar_timeout,
        free_whitespace=config.free_json_whitespace,
    )
    embedding, settings = None, resolved.scheduler_settings(spec)
    if embedder is not None:
        embedding = EmbeddingCore(
            embedder, places=settings, board=board, adapters=adapter_queue and adapter_queue.line()
        )
    # Processed scores depend on what was sampled beside: nobody but the sampler can tell them.
    is_raw = not config.logprobs_mode.startswith("processed_")
    settings = dataclasses.replace(settings, scores_known_tokens=is_raw)
    core = EngineCore(
        settings,
        runner,
        cache,
        grammars=grammars,
        adapters=adapters,
        adapter_queue=adapter_queue,
        embedding=embedding,
        board=board,
        cpu_clock=CpuClock(lambda: runner.context.kernel_seconds),
        use_idle_time=runner.capture_next,
    )
    if not isinstance(spec, ModelSpec):
        logger.info(
            "%s runs through transformers: its own modules on this engine's cache, attention and products; "
            "batch_invariant %s%s",
            spec.architecture,
            "true" if runner.verdict.is_batch_invariant else "false: ",
            runner.verdict.reason,
        )
    batch_reason = runner.verdict.reason
    if config.device == "cuda" and not config.deterministic:
        batch_reason = FOLLOWS_BATCH
    ready = EngineReady(
        max_total_tokens=resolved.max_total_tokens,
        max_running_requests=resolved.max_running_requests,
        block_size=resolved.page_size,
        context_length=resolved.context_length,
        dtype=resolved.dtype,
        kv_cache_dtype=resolved.kv_cache_dtype,
        device=config.device,
        cpu_isa=runner.context.isa,
        num_threads=resolved.num_threads,
        max_queued_requests=resolved.max_queued_requests,
        embedding=None if embedding is None else embedding.info,
        takes_adapters=adapters is not None,
        implementation="native" if isinstance(spec, ModelSpec) else "transformers",
        is_batch_invariant=not batch_reason,
        batch_reason=batch_reason,
    )
    return core, ready


def on_device(resolved: ResolvedConfig) -> dict[str, Any]:
    """What a runner on a GPU is given beside what every runner is."""
    if resolved.device == "cpu":
        return {}
    from engine.ops import cuda
    from engine.ops.placement import on_gpu
    from engine.runner.decode_graphs import cuda_capture

    return {
        "ops": cuda,
        "placement": on_gpu(resolved.dtype),
        "context": cuda.ExecutionContext(is_deterministic=resolved.deterministic),
        "capture": cuda_capture() if resolved.captures_graphs else None,
    }
