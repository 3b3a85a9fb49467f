"""The whole engine behind the HTTP layer: a tiny Llama with random weights, served by its own process.

The examples of the API's specification run as printed, but for the model's name and the port.
"""

from __future__ import annotations

import concurrent.futures
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import psutil
import pytest

from helpers.http_server import DEADLINE_S, events_of, wait_until
from helpers.server_process import ServerProcess, write_llama

NAME = "meta-llama/Llama-3.1-8B-Instruct"
FLAGS = (
    "--load-format dummy --max-running-requests 4 --max-queued-requests 2 --max-total-tokens 4096 "
    "--num-threads 2 --served-model-name " + NAME
)
PROMPT = "Tell me about a place where nobody has been. " * 6


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = write_llama(tmp_path_factory.mktemp("llama"))
    with ServerProcess("--model-path", str(directory), *FLAGS.split()) as process:
        process.wait_ready()
        yield process
        assert process.stop() == 0
        assert "Traceback" not in process.log
        assert PROMPT[:20] not in process.log


@pytest.fixture
def client(server: ServerProcess) -> openai.OpenAI:
    return server.sdk()


def complete(server: ServerProcess, **fields: Any) -> httpx.Response:
    body = {
        "model": "default",
        "prompt": PROMPT,
        "temperature": 0,
        "max_tokens": 8,
        "ignore_eos": True,
        **fields,
    }
    return server.http.post("/v1/completions", json=body)


# --- the specification's examples


def test_basic_example(client: openai.OpenAI) -> None:
    response = client.chat.completions.create(
        model="meta-llama/Llama-3.1-8B-Instruct",
        messages=[
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "What is the capital of France?"},
        ],
        temperature=0.8,
        max_tokens=128,
    )
    assert isinstance(response.choices[0].message.content, str)
    assert response.id.startswith("chatcmpl-")
    assert response.object == "chat.completion"
    assert response.model == "meta-llama/Llama-3.1-8B-Instruct"
    assert response.choices[0].finish_reason in ("stop", "length")
    assert response.usage.total_tokens == response.usage.prompt_tokens + response.usage.completion_tokens


def test_streaming_example(client: openai.OpenAI, capsys: pytest.CaptureFixture[str]) -> None:
    response = client.chat.completions.create(
        model="meta-llama/Llama-3.1-8B-Instruct",
        messages=[{"role": "user", "content": "Tell me a story"}],
        stream=True,
        temperature=0.8,
    )

    for chunk in response:
        if chunk.choices[0].delta.content:
            print(chunk.choices[0].delta.content, end="", flush=True)
    assert capsys.readouterr().out


def test_cache_reporting_example(client: openai.OpenAI, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        response = client.chat.completions.create(
            model="meta-llama/Llama-3.1-8B-Instruct",
            messages=[{"role": "user", "content": "Hello, " * 20}],
            extra_body={"return_cached_tokens_details": True},
        )

        # Check cache statistics
        if response.usage.prompt_tokens_details:
            print(f"Cached tokens: {response.usage.prompt_tokens_details.cached_tokens}")
    lines = capsys.readouterr().out.split("\n")
    assert lines[0] == "Cached tokens: 0"
    assert lines[1] == f"Cached tokens: {(response.usage.prompt_tokens - 1) // 16 * 16}"


def test_text_completion_example(client: openai.OpenAI) -> None:
    response = client.completions.create(
        model="meta-llama/Llama-3.1-8B-Instruct", prompt="Once upon a time", max_tokens=100, temperature=0.8
    )
    assert 0 < response.usage.completion_tokens <= 100


def test_model_examples(client: openai.OpenAI) -> None:
    models = client.models.list()
    assert [model.id for model in models.data] == [NAME]
    model = client.models.retrieve("meta-llama/Llama-3.1-8B-Instruct")
    assert f"Max context: {model.max_model_len}" == "Max context: 1024"


def test_health_and_information_examples(server: ServerProcess) -> None:
    assert server.http.get("/health").status_code == 200
    info = server.http.get("/get_model_info").json()
    assert (info["max_running_requests"], info["max_queued_requests"], info["max_total_tokens"]) == (
        4,
        2,
        4096,
    )


def test_error_example(server: ServerProcess) -> None:
    body = {"model": NAME, "messages": [{"role": "user", "content": "x"}], "temperature": -1}
    answer = server.http.post("/v1/chat/completions", json=body).json()
    assert {name: answer[name] for name in ("object", "message", "type", "code")} == {
        "object": "error",
        "message": "Invalid request: temperature must be non-negative",
        "type": "invalid_request_error",
        "code": 400,
    }


# --- what only the real engine shows


def test_a_stream_says_the_same_as_the_whole_answer(server: ServerProcess) -> None:
    whole = complete(server, logprobs=3, max_tokens=40).json()
    options = {"include_usage": True}
    events = list(events_of(complete(server, logprobs=3, max_tokens=40, stream=True, stream_options=options)))
    choices = [event["choices"][0] for event in events[:-1]]
    (expected,) = whole["choices"]
    assert "".join(choice["text"] for choice in choices) == expected["text"]
    for name, values in expected["logprobs"].items():
        assert [value for choice in choices for value in choice["logprobs"][name]] == values
    assert events[-1]["usage"] == whole["usage"]
    assert whole["usage"]["completion_tokens"] == 40


def test_a_repeated_prompt_is_cached_and_answers_the_same(server: ServerProcess) -> None:
    fields = {"prompt": "q" * 500, "return_cached_tokens_details": True, "logprobs": 1, "cache_salt": "cold"}
    cold, warm = (complete(server, **fields).json() for _ in range(2))
    assert cold["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert warm["usage"]["prompt_tokens_details"] == {"cached_tokens": 496}
    assert cold["choices"] == warm["choices"]
    other = complete(server, **{**fields, "cache_salt": "other"}).json()
    assert other["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


def test_a_flushed_cache_is_empty(server: ServerProcess) -> None:
    fields = {"prompt": "f" * 500, "return_cached_tokens_details": True}
    cached = []
    for flushes in (False, False, True):
        if flushes:
            assert server.http.post("/flush_cache?timeout=30").status_code == 200
        usage = complete(server, **fields).json()["usage"]
        cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert cached == [0, 496, 0]


def test_a_running_request_is_seen_and_aborted(server: ServerProcess) -> None:
    with concurrent.futures.ThreadPoolExecutor() as threads:

        def num_running() -> int:
            return server.http.get("/v1/loads").json()["aggregate"]["num_running_reqs"]

        for _ in range(10):  # it may end before it is seen
            started = threads.submit(complete, server, rid="mine", n=4, max_tokens=700)
            wait_until(lambda: started.done() or num_running() == 4)  # noqa: B023
            flush = server.http.post("/flush_cache")
            aborted = server.http.post("/abort_request", json={"rid": "mine"}).json()
            choices = started.result(DEADLINE_S).json()["choices"]
            if aborted == {"aborted": 1}:
                break
    assert (flush.status_code, aborted) == (400, {"aborted": 1})
    assert [choice["finish_reason"] for choice in choices] == ["abort"] * 4
    wait_until(lambda: server.http.get("/v1/loads").json()["aggregate"]["num_used_tokens"] == 0)


def test_operators_see_what_the_engine_did(server: ServerProcess) -> None:
    assert server.http.get("/health_generate").json() == {"status": "ok"}
    complete(server)
    info = server.http.get("/server_info").json()
    assert info["load"]["max_total_num_tokens"] == 4096
    lines = server.http.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values["engine:max_total_num_tokens"]) == 4096
    assert float(values["engine:generation_tokens_total"]) >= 8
    assert float(values["engine:e2e_request_latency_seconds_count"]) >= 1


def test_everything_that_fits_the_context_is_served(server: ServerProcess) -> None:
    body = complete(server, prompt="x" * 1000, max_tokens=24).json()
    assert body["usage"]["total_tokens"] == 1024
    assert (
        complete(server, prompt="x" * 1000, max_tokens=25).json()["error"]["code"]
        == "context_length_exceeded"
    )
    assert complete(server, prompt="x" * 1024).json()["error"]["code"] == "context_length_exceeded"
    assert complete(server, prompt="x" * 1023, max_tokens=1).status_code == 200


def test_a_burst_is_answered_or_refused_and_nothing_is_lost(server: ServerProcess) -> None:
    """Four run, two wait, the others get a real 503 before any byte of a stream."""
    answers: list[httpx.Response] = []
    are_ready = threading.Barrier(32)

    def ask(i: int) -> None:
        with httpx.Client(base_url=server.url, timeout=DEADLINE_S, trust_env=False) as http:
            body = {
                "model": "default",
                "prompt": f"{i} " + PROMPT,
                "max_tokens": 400,
                "ignore_eos": True,
                "stream": i % 2 == 0,
            }
            http.get("/health")  # it is connected
            are_ready.wait(DEADLINE_S)
            answers.append(http.post("/v1/completions", json=body))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= 6
    for answer in answers:
        if answer.status_code == 503:
            assert answer.json()["error"]["code"] == "queue_full"
            assert int(answer.headers["retry-after"]) >= 1
        elif answer.headers["content-type"].startswith("text/event-stream"):
            *_, last = events_of(answer)
            assert last["choices"][0]["finish_reason"] == "length"
        else:
            assert answer.json()["usage"]["completion_tokens"] == 400
    assert complete(server).status_code == 200


def test_vanished_clients_leave_room_for_others(server: ServerProcess) -> None:
    """Were their slots not freed, the last request would wait behind 4 times 4 long answers."""
    body = {"model": "default", "prompt": PROMPT, "max_tokens": 700, "ignore_eos": True, "stream": True}
    for _ in range(4):
        streams = []
        for _ in range(4):
            http = httpx.Client(base_url=server.url, timeout=DEADLINE_S, trust_env=False)
            stream = http.stream("POST", "/v1/completions", json=body)
            response = stream.__enter__()
            assert response.status_code == 200
            assert next(response.iter_lines()).startswith("data: ")
            streams.append((http, stream))
        for http, stream in streams:
            stream.__exit__(None, None, None)
            http.close()
    wait_until(lambda: complete(server, max_tokens=1).status_code == 200)
    finished = [line for line in server.log.splitlines() if '"completion_tokens":700' in line]
    assert len(finished) < 16


def test_memory_of_the_server_process_is_modest(server: ServerProcess) -> None:
    process = psutil.Process(server.process.pid)
    assert process.memory_full_info().uss < 120 * 2**20


def test_the_log_has_one_line_a_request(server: ServerProcess) -> None:
    answer = server.http.post(
        "/v1/completions",
        json={"model": "default", "prompt": PROMPT, "max_tokens": 3, "ignore_eos": True},
        headers={"x-request-id": "look-for-me"},
    )
    response_id = json.loads(answer.content)["id"]
    wait_until(lambda: "look-for-me" in server.log)
    (line,) = [line for line in server.log.splitlines() if "look-for-me" in line]
    entry = json.loads(line)
    assert (entry["id"], entry["request_id"], entry["status"]) == (response_id, "look-for-me", 200)
    assert (entry["prompt_tokens"], entry["completion_tokens"], entry["end"]) == (len(PROMPT), 3, "length")
    assert entry["queue_ms"] <= entry["ttft_ms"] <= entry["total_ms"]
