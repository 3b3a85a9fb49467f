"""How busy the engine is, in the numbers that operators and load balancers look at."""

from __future__ import annotations

import asyncio
import dataclasses

from engine.core.messages import EngineReady, EngineStats
from engine.errors import Overloaded
from engine.server.context import ServerContext

STATS_TIMEOUT_S = 5.0


@dataclasses.dataclass(frozen=True)
class Load:
    """Requests are counted by choice; `token_usage` and `cache_hit_rate` are fractions.

    A cached token that no request holds counts as free: it goes when its place is needed.
    """

    num_running_reqs: int
    num_waiting_reqs: int
    num_total_reqs: int
    num_grammar_queue_reqs: int
    """Of those that wait, requests whose constraint is being compiled."""
    num_used_tokens: int
    max_total_num_tokens: int
    token_usage: float
    cache_hit_rate: float
    num_preemptions: int
    num_free_tokens: int
    """Places of the KV cache that hold nothing."""
    num_cached_tokens: int
    """Places that hold what no request uses, until they are needed."""
    num_evicted_tokens: int
    lora_pool_slots_used: int
    """Adapters in memory."""
    lora_pool_slots_total: int
    lora_num_in_use: int
    lora_num_evictions: int
    spec_num_draft_tokens: int
    """Tokens guessed by speculative decoding, and computed."""
    spec_num_accepted_tokens: int
    """Of these, those that were right."""


async def fetch_load(context: ServerContext) -> Load:
    """Where the engine stands now. Raises `Overloaded` if it is not there, or does not say in time."""
    _, ready = context.require_ready()
    return load_of(await fetch_stats(context), ready, context.engine_config.max_loaded_loras)


async def fetch_stats(context: ServerContext) -> EngineStats:
    """Raises `Overloaded` as `fetch_load`."""
    try:
        async with asyncio.timeout(STATS_TIMEOUT_S):
            return await context.client.stats()
    except TimeoutError:
        raise Overloaded("The engine does not answer in time.", slug="queue_timeout") from None


def load_of(stats: EngineStats, ready: EngineReady, max_loaded_loras: int) -> Load:
    prompt_tokens = stats.prompt_tokens_cached + stats.prompt_tokens_computed
    return Load(
        num_running_reqs=stats.num_running,
        num_waiting_reqs=stats.num_waiting,
        num_total_reqs=stats.num_running + stats.num_waiting,
        num_grammar_queue_reqs=stats.num_compiling,
        num_used_tokens=stats.num_blocks_in_use * ready.block_size,
        max_total_num_tokens=stats.num_blocks_total * ready.block_size,
        token_usage=stats.num_blocks_in_use / max(1, stats.num_blocks_total),
        cache_hit_rate=stats.prompt_tokens_cached / max(1, prompt_tokens),
        num_preemptions=stats.num_preemptions,
        num_free_tokens=stats.num_blocks_free * ready.block_size,
        num_cached_tokens=stats.num_blocks_cached * ready.block_size,
        num_evicted_tokens=stats.tokens_evicted,
        lora_pool_slots_used=stats.num_adapters_loaded,
        lora_pool_slots_total=max_loaded_loras,
        lora_num_in_use=stats.num_adapters_in_use,
        lora_num_evictions=stats.num_adapter_evictions,
        spec_num_draft_tokens=stats.draft_tokens,
        spec_num_accepted_tokens=stats.accepted_tokens,
    )
