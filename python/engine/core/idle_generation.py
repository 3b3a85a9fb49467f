"""The generating half of an engine that only embeds: it has nothing to do, and refuses to have."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.cache.prefix_cache import PrefixCache
from engine.core.embedding_core import EmbeddingCore
from engine.core.embedding_io import only_embeds_error
from engine.core.engine_core import EngineCore
from engine.core.messages import GenerateRequest
from engine.scheduling.settings import SchedulerSettings
from engine.scheduling.step_plan import StepPlan, Wait

if TYPE_CHECKING:
    from engine.adapters.adapter_pool import AdapterPool


class _NoRunner:
    def launch(self, plan: StepPlan, before_draws: Callable[[], None] | None = None) -> Wait:
        raise AssertionError("a request to generate was let in")


class _EmbeddingEngine(EngineCore):
    def submit(self, request: GenerateRequest) -> None:
        self.refuse(request.request_id, only_embeds_error())


def idle_engine(embedding: EmbeddingCore, adapters: AdapterPool | None = None) -> EngineCore:
    """An engine around an embedding core, without a model that generates; `adapters` are the core's."""
    settings = SchedulerSettings(
        context_length=1,
        vocab_size=embedding.info.vocab_size,
        max_running_requests=1,
        max_queued_requests=0,
        chunked_prefill_size=1,
    )
    cache = PrefixCache(1, 16)
    return _EmbeddingEngine(settings, _NoRunner(), cache, adapters=adapters, embedding=embedding)
