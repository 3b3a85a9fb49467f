"""GET /metrics, in the text formats of Prometheus."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.exposition import ALLOWUTF8
from prometheus_client.openmetrics.exposition import generate_latest as open_metrics
from sanic import HTTPResponse, Sanic
from sanic.request import Request

from engine.core.cpu_clock import process_cpu_s
from engine.core.messages import EngineStats
from engine.errors import Overloaded
from engine.server.context import ServerContext
from engine.server.load import Load, fetch_stats, load_of
from engine.server.metrics import PREFIX

_OPEN_METRICS = "application/openmetrics-text"


def add_routes(app: Sanic, context: ServerContext) -> None:
    @app.get("/metrics", ignore_body=True)
    async def metrics(request: Request) -> HTTPResponse:
        families = [*context.metrics.collect()]
        text = "Times that the engine died and was started again."
        families.append(
            CounterMetricFamily(PREFIX + "engine_restarts", text, value=context.client.num_restarts)
        )
        with contextlib.suppress(Overloaded):  # while the engine is away, its numbers are left out
            _, ready = context.require_ready()
            stats = await fetch_stats(context)
            load = load_of(stats, ready, context.engine_config.max_loaded_loras)
            families += [*load_families(load), *_step_families(stats)]
            families += [_cpu_family(stats), *_vllm_families(load)]
        return written(families, request)


def written(families: Iterable[Metric], request: Request) -> HTTPResponse:
    """The metrics in the newer of the two formats if the client says that it reads that."""
    snapshot = _Snapshot(families)
    if _OPEN_METRICS in request.headers.get("accept", ""):
        content_type = f"{_OPEN_METRICS}; version=1.0.0; charset=utf-8"
        # The library's default would put an underscore in place of the colon of samples.
        return HTTPResponse(open_metrics(snapshot, escaping=ALLOWUTF8), content_type=content_type)
    content_type = "text/plain; version=0.0.4; charset=utf-8"
    return HTTPResponse(generate_latest(snapshot), content_type=content_type)


@dataclasses.dataclass
class _Snapshot:
    """What the library takes for a registry."""

    families: Iterable[Metric]

    def collect(self) -> Iterable[Metric]:
        return self.families


def _step_families(stats: EngineStats) -> Iterator[Metric]:
    yield CounterMetricFamily(PREFIX + "steps", "Steps of the engine.", value=stats.num_steps)
    text = "Time in steps, by part: deciding what to compute, computing it, booking what came out."
    seconds = CounterMetricFamily(PREFIX + "step_seconds", text, labels=["part"])
    for part, value in (
        ("schedule", stats.schedule_s),
        ("model", stats.model_s),
        ("update", stats.update_s),
    ):
        seconds.add_metric([part], value)
    yield seconds


def _cpu_family(stats: EngineStats) -> Metric:
    text = "CPU time: of the process that serves HTTP, of the engine's process, and of kernels within that."
    family = CounterMetricFamily(PREFIX + "cpu_seconds", text, labels=["part"])
    for part, value in (
        ("server", process_cpu_s()),
        ("engine", stats.cpu_s),
        ("kernels", stats.kernel_cpu_s),
    ):
        family.add_metric([part], value)
    return family


def _vllm_families(load: Load) -> Iterator[Metric]:
    """The same numbers under the names that dashboards made for vLLM look for."""
    for name, value in (
        ("num_requests_running", load.num_running_reqs),
        ("num_requests_waiting", load.num_waiting_reqs),
        ("kv_cache_usage_perc", load.token_usage),
    ):
        yield GaugeMetricFamily(PREFIX + name, "As vLLM calls it.", value=value)


def load_families(load: Load) -> Iterator[Metric]:
    """How busy the engine is, as metrics."""
    for name, text, value in (
        ("num_running_reqs", "Choices being computed.", load.num_running_reqs),
        ("num_queue_reqs", "Choices that wait.", load.num_waiting_reqs),
        (
            "num_grammar_queue_reqs",
            "Requests whose constraint is being compiled.",
            load.num_grammar_queue_reqs,
        ),
        ("num_retracted_reqs", "Running requests put back into the queue so far.", load.num_preemptions),
        ("token_usage", "Part of the KV cache that requests hold.", load.token_usage),
        ("num_used_tokens", "Tokens of the KV cache that requests hold.", load.num_used_tokens),
        ("kv_used_tokens", "The same.", load.num_used_tokens),
        ("max_total_num_tokens", "Tokens that the KV cache holds at most.", load.max_total_num_tokens),
        ("kv_available_tokens", "Tokens of the KV cache that nothing is in.", load.num_free_tokens),
        ("kv_evictable_tokens", "Tokens cached that no request holds.", load.num_cached_tokens),
        ("cache_hit_rate", "Part of all prompt tokens that were cached.", load.cache_hit_rate),
        ("lora_pool_slots_used", "Adapters in memory.", load.lora_pool_slots_used),
        ("lora_pool_slots_total", "Adapters that memory may hold.", load.lora_pool_slots_total),
        (
            "lora_pool_utilization",
            "Part of the places for adapters that is taken.",
            load.lora_pool_slots_used / load.lora_pool_slots_total,
        ),
        ("lora_in_use", "Different adapters that requests use.", load.lora_num_in_use),
    ):
        yield GaugeMetricFamily(PREFIX + name, text, value=value)
    text = "Adapters that made room for others."
    yield CounterMetricFamily(PREFIX + "lora_evictions", text, value=load.lora_num_evictions)
    text = "Cached tokens that made room for others."
    yield CounterMetricFamily(PREFIX + "evicted_tokens", text, value=load.num_evicted_tokens)
    text = "Tokens guessed by speculative decoding, and computed."
    yield CounterMetricFamily(PREFIX + "spec_draft_tokens", text, value=load.spec_num_draft_tokens)
    text = "Guessed tokens that were right."
    yield CounterMetricFamily(PREFIX + "spec_accepted_tokens", text, value=load.spec_num_accepted_tokens)
    text = "Part of the guessed tokens that were right."
    rate = load.spec_num_accepted_tokens / max(1, load.spec_num_draft_tokens)
    yield GaugeMetricFamily(PREFIX + "spec_accept_rate", text, value=rate)
    text = "Running requests put back into the queue."
    yield CounterMetricFamily(PREFIX + "num_preemptions", text, value=load.num_preemptions)
