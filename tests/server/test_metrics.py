"""GET /metrics: what is counted, under which names, and that clients cannot make up labels."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open_metrics
from prometheus_client.parser import text_string_to_metric_families

from engine.core.client import EngineState
from engine.errors import InternalError, Overloaded
from engine.server.token_tally import TokenTally
from helpers.http_server import DEADLINE_S, Server, wait_until

KINDS = {"counter", "gauge", "histogram"}
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(server: Server) -> Samples:
    response = server.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return {
        (sample.name.removeprefix("engine:"), frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples.get((name, frozenset(labels.items())), 0.0)


@pytest.fixture
def fresh(model_dir: Path) -> Server:
    with Server(model_dir) as server:
        yield server


def test_names(fresh: Server) -> None:
    fresh.chat()
    text = fresh.get("/metrics").text
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    assert all(name.startswith("engine:") for name in names)
    expected = (
        "num_running_reqs num_queue_reqs token_usage num_used_tokens max_total_num_tokens cache_hit_rate "
        "kv_available_tokens kv_evictable_tokens evicted_tokens_total spec_draft_tokens_total "
        "spec_accepted_tokens_total "
        "num_preemptions_total prompt_tokens_total generation_tokens_total cached_tokens_total "
        "num_requests_total num_aborted_requests_total rejected_total http_responses_total "
        "time_to_first_token_seconds inter_token_latency_seconds e2e_request_latency_seconds "
        "queue_time_seconds prompt_tokens_histogram generation_tokens_histogram "
        "num_grammar_queue_reqs num_retracted_reqs gen_throughput kv_used_tokens num_so_requests_total "
        "request_time_per_output_token_seconds per_stage_req_latency_seconds "
        "uncached_prompt_tokens_histogram http_requests_total http_requests_active "
        "lora_pool_slots_used lora_pool_slots_total "
        "lora_pool_utilization spec_accept_rate cpu_seconds_total steps_total step_seconds_total "
        "num_requests_running num_requests_waiting kv_cache_usage_perc engine_restarts_total"
    )
    assert {f"engine:{name}" for name in expected.split()} <= names


def test_gaps_fall_into_the_bucket_of_their_length() -> None:
    tally = TokenTally("engine:")
    tally.add(1)
    for num_tokens, seconds in ((1, 0.001), (2, 0.0021), (1, 0.04), (1, 9.0)):
        tally.add_after(num_tokens, seconds)
    tokens, _, gaps = tally.collect()
    assert [sample.value for sample in tokens.samples] == [6]
    counts = {s.labels["le"]: s.value for s in gaps.samples if s.name.endswith("_bucket")}
    expected = {"0.001": 1, "0.0025": 2, "0.03": 2, "0.05": 3, "5.0": 3, "+Inf": 4}
    assert expected.items() <= counts.items()
    total = next(s.value for s in gaps.samples if s.name.endswith("_sum"))
    assert total == pytest.approx(0.001 + 0.0021 / 2 + 0.04 + 9)


def test_tokens_and_latencies_of_requests(fresh: Server) -> None:
    fresh.engine.cached_tokens = 1
    usages = [
        fresh.chat().json()["usage"],
        fresh.complete(prompt=["a", "bc"], n=2, max_tokens=3).json()["usage"],
    ]
    fresh.complete(stream=True, max_tokens=5, prompt="Hello")
    samples = scrape(fresh)
    completion = sum(usage["completion_tokens"] for usage in usages) + 5
    assert value(samples, "generation_tokens_total") == completion
    assert value(samples, "prompt_tokens_total") == sum(u["prompt_tokens"] for u in usages) + 5
    assert value(samples, "cached_tokens_total") == 4  # one for each prompt
    assert value(samples, "num_requests_total") == 3
    for total in ("prompt_tokens", "generation_tokens"):
        assert value(samples, f"{total}_histogram_sum") == value(samples, f"{total}_total")
        assert value(samples, f"{total}_histogram_count") == 3
    assert value(samples, "uncached_prompt_tokens_histogram_sum") == value(samples, "prompt_tokens_total") - 4
    assert value(samples, "request_time_per_output_token_seconds_count") == 3
    for stage in ("queue", "prefill", "decode"):
        assert value(samples, "per_stage_req_latency_seconds_count", stage=stage) == 3
    assert value(samples, "generation_tokens_histogram_bucket", le="4.0") == 0
    assert value(samples, "generation_tokens_histogram_bucket", le="8.0") == 1  # the one of 5 tokens
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "queue_time_seconds"):
        assert value(samples, f"{name}_count") == 3
    num_choices = 1 + 4 + 1
    assert value(samples, "inter_token_latency_seconds_count") == completion - num_choices
    first, last = (
        value(samples, f"{n}_sum") for n in ("time_to_first_token_seconds", "e2e_request_latency_seconds")
    )
    assert 0 < first < last < DEADLINE_S
    assert value(samples, "num_aborted_requests_total") == 0
    assert value(samples, "max_total_num_tokens") == 8192


def test_throughput_is_of_the_time_since_the_last_look(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("engine.server.token_tally.monotonic", lambda: now)
    tally = TokenTally("engine:")
    found = []
    for at_s, num_tokens in ((2.0, 10), (2.5, 4), (4.0, 2), (14.0, 0)):
        now = at_s
        tally.add(num_tokens)
        found.append(tally.throughput())
    assert found == [5, 5, 3, 0], "half a second is too short to tell"


def test_requests_over_http_are_counted_while_they_last(fresh: Server) -> None:
    path = "/v1/chat/completions"
    labels = {"endpoint": path, "method": "POST"}
    fresh.call(fresh.engine.hold)
    body = {"model": "default", "messages": [{"role": "user", "content": "a"}], "stream": True}
    with fresh.http.stream("POST", path, json=body) as response:
        assert response.status_code == 200
        samples = scrape(fresh)
        assert value(samples, "http_requests_active", **labels) == 1
        assert value(samples, "http_requests_active", endpoint="/metrics", method="GET") == 1, (
            "the one that asks"
        )
        assert value(samples, "http_responses_total", **labels, status_code="200") == 1
    wait_until(lambda: value(scrape(fresh), "http_requests_active", **labels) == 0)
    fresh.call(fresh.engine.release)
    fresh.chat(temperature=-1)
    fresh.get("/made-up")
    samples = scrape(fresh)
    assert value(samples, "http_requests_total", **labels) == 2
    assert value(samples, "http_requests_total", endpoint="other", method="GET") == 1
    assert value(samples, "http_requests_active", **labels) == 0


def test_requests_with_a_constraint_are_counted(fresh: Server) -> None:
    fresh.chat()
    fresh.chat(regex="a+")
    assert value(scrape(fresh), "num_so_requests_total") == 1


def test_a_stop_string_completes_a_request(fresh: Server) -> None:
    assert fresh.chat(stop="there").json()["choices"][0]["finish_reason"] == "stop"
    assert value(scrape(fresh), "e2e_request_latency_seconds_count") == 1


def test_aborted_and_failed_requests_are_not_complete(fresh: Server) -> None:
    fresh.call(fresh.engine.hold)
    thread = threading.Thread(target=lambda: fresh.chat(rid="mine"))
    thread.start()
    wait_until(lambda: fresh.post("/abort_request", {"rid": "mine"}).json()["aborted"] == 1)
    thread.join(DEADLINE_S)
    body = {"model": "default", "messages": [{"role": "user", "content": "a"}], "stream": True}
    with fresh.http.stream("POST", "/v1/chat/completions", json=body):
        pass  # the client goes
    wait_until(lambda: value(scrape(fresh), "num_aborted_requests_total") == 2)
    fresh.call(fresh.engine.release)
    fresh.engine.fail_with = InternalError("broken")
    fresh.chat()
    fresh.chat(stream=True)
    samples = scrape(fresh)
    assert value(samples, "num_requests_total") == 4
    assert value(samples, "num_aborted_requests_total") == 2
    assert value(samples, "e2e_request_latency_seconds_count") == 0


def test_refusals_are_counted_by_reason(fresh: Server) -> None:
    fresh.engine.refuse_with = Overloaded("full")
    fresh.chat()
    fresh.chat(stream=True)
    fresh.engine.refuse_with = None
    fresh.complete(temperature=-1)
    fresh.complete(model="nope")
    fresh.post("/v1/completions", [])
    fresh.engine.fail_with = InternalError("broken")
    fresh.chat()
    samples = scrape(fresh)
    reasons = {dict(labels)["reason"]: v for (name, labels), v in samples.items() if name == "rejected_total"}
    assert reasons == {"queue_full": 2, "invalid_value": 1, "model_not_found": 1, "invalid_json": 1}
    assert value(samples, "num_requests_total") == 1


def test_answers_are_counted_by_route_and_clients_make_up_no_label(fresh: Server) -> None:
    fresh.chat()
    fresh.chat(stream=True)
    fresh.chat(temperature=-1)
    fresh.get("/v1/models/org/a")
    fresh.get("/v1/models/org/b")
    for i in range(3):
        fresh.get(f"/made-up-{i}")
        fresh.http.delete("/v1/models")
    fresh.raw(b"INVENTED /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
    samples = scrape(fresh)

    def count(endpoint: str, method: str, status: int) -> float:
        return value(
            samples, "http_responses_total", endpoint=endpoint, method=method, status_code=str(status)
        )

    assert count("/v1/chat/completions", "POST", 200) == 2
    assert count("/v1/chat/completions", "POST", 400) == 1
    assert count("/v1/models/{model_id}", "GET", 404) == 2
    assert count("other", "GET", 404) == 3
    assert count("other", "DELETE", 405) == 3
    labels = {v for name, labels in samples if name == "http_responses_total" for _, v in labels}
    assert not any("made-up" in label or "INVENTED" in label for label in labels)


def test_without_the_engine_its_numbers_are_left_out(fresh: Server) -> None:
    fresh.chat()
    fresh.call(lambda: fresh.engine.set_state(EngineState.RESTARTING, "gone"))
    samples = scrape(fresh)
    assert value(samples, "num_requests_total") == 1
    assert ("num_running_reqs", frozenset()) not in samples


@pytest.mark.parametrize("accept", ["", "*/*", "text/plain;version=x", "application/json", "\x7f;;,=q"])
def test_the_plain_format_is_for_everybody(fresh: Server, accept: str) -> None:
    assert fresh.get("/metrics", headers={"accept": accept}).headers["content-type"].startswith("text/plain")


def test_open_metrics_for_those_who_ask(fresh: Server) -> None:
    fresh.chat()
    response = fresh.get(
        "/metrics", headers={"accept": "application/openmetrics-text;version=1.0.0,*/*;q=0.1"}
    )
    assert response.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    families = list(parse_open_metrics(response.text))
    names = {family.name for family in families}
    assert {"engine:num_requests", "engine:token_usage", "engine:queue_time_seconds"} <= names
    plain = scrape(fresh)
    samples = {sample.name.removeprefix("engine:") for family in families for sample in family.samples}
    assert samples == {name for name, _ in plain} and {family.type for family in families} <= KINDS


def test_two_servers_count_apart(fresh: Server, model_dir: Path) -> None:
    with Server(model_dir) as other:
        fresh.chat()
        assert value(scrape(fresh), "num_requests_total") == 1
        assert value(scrape(other), "num_requests_total") == 0
