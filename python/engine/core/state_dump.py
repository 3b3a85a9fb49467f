"""What an engine is busy with, for whoever wonders why: counts and ids, never content."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from engine.cache.prefix_cache import PrefixCache
from engine.core.embedding_core import EmbeddingCore
from engine.core.embedding_queue import EmbeddingJob
from engine.core.messages import GenerateRequest
from engine.scheduling.request import Request
from engine.scheduling.scheduler import Scheduler


def describe_engine(
    scheduler: Scheduler,
    cache: PrefixCache,
    embedding: EmbeddingCore | None,
    compiling: Iterable[GenerateRequest],
) -> dict[str, Any]:
    """For JSON. `compiling`: requests whose constraint is not ready. Cost: linear in requests."""
    return {
        "embedding": None
        if embedding is None
        else {
            "running": [_describe_job(job) for job in embedding.queue.running],
            "waiting": [_describe_job(job) for job in embedding.queue.waiting],
            "num_batches": embedding.num_batches,
        },
        "running": [_describe(request) for request in scheduler.running],
        "waiting": [_describe(request) for request in scheduler.waiting],
        "compiling": [
            {"id": r.request_id, "x_request_id": r.trace_id or None, "key": r.client, "choices": r.n}
            for r in compiling
        ],
        "blocks": {
            "size": cache.block_size,
            "total": cache.num_blocks,
            "free": cache.num_free,
            "cached": cache.num_cached,
            "in_use": cache.num_in_use,
        },
        "tree": cache.tree_stats(),
        "steps": scheduler.counters.num_steps,
        "preemptions": scheduler.counters.num_preemptions,
    }


def _describe(request: Request) -> dict[str, Any]:
    awaited = request.awaited
    return {
        "id": request.request_id,
        "x_request_id": request.trace_id or None,
        "choice": request.choice,
        "key": request.client,
        "priority": request.priority,
        "prompt_tokens": request.prompt_len,
        "output_tokens": request.num_output,
        "computed_tokens": request.num_computed,
        "most_tokens": request.max_known,
        "blocks": request.num_blocks,
        "shared_blocks": request.num_shared,
        "runs_alone": request.runs_alone,
        "preemptions": request.num_preemptions,
        "waits_for": None if awaited is None else f"{awaited.request_id}/{awaited.choice}",
    }


def _describe_job(job: EmbeddingJob) -> dict[str, Any]:
    return {
        "id": job.request_id,
        "x_request_id": job.trace_id or None,
        "key": job.client,
        "texts": len(job.texts),
        "tokens": job.prompt_len,
        "computed_texts": job.num_done,
        "runs_alone": job.runs_alone,
    }
