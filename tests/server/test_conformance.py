"""What clients of the OpenAI API rely on: the bundled model, through the openai SDK and plain HTTP."""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from engine.config.model_location import bundled_model
from helpers.crowd import metrics
from helpers.http_server import DEADLINE_S, events_of, sent_post, wait_until
from helpers.server_process import ServerProcess

KEYS = ("a-first-key", "another-key")
NAME, ALIAS = "org/model:v1", "plain"
STORY = [{"role": "user", "content": "Tell me a story"}]
ADAPTERS = bundled_model() / "adapters"
LONG = [1000 + 7 * i % 900 for i in range(500)]


@pytest.fixture(scope="module")
def client(bundled: ServerProcess) -> openai.OpenAI:
    return bundled.sdk()


@pytest.fixture(scope="module")
def guarded() -> Iterator[ServerProcess]:
    """The same model with keys, names and the cache report of its own, and adapters that have a path."""
    flags = ["--enable-cache-report", "--lora-dir", str(ADAPTERS), "--matryoshka-dimensions", "any"]
    for key in KEYS:
        flags += ["--api-key", key]
    for name in (NAME, ALIAS):
        flags += ["--served-model-name", name]
    with ServerProcess(*flags) as process:
        process.wait_ready()
        yield process
        assert process.stop() == 0
        # Shown to nobody, and not written down either.
        assert not any(key in process.log for key in (*KEYS, "a-wrong-key"))


def with_key(server: ServerProcess, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=DEADLINE_S)


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": "default", "messages": STORY, **fields})


def complete(client: openai.OpenAI, **fields: Any) -> Any:
    """A greedy text completion of known length; fields that the SDK does not know go into extra_body."""
    extra = {"ignore_eos": True, **fields.pop("extra_body", {})}
    defaults = {"model": "default", "prompt": "Once upon a time", "temperature": 0, "max_tokens": 24}
    return client.completions.create(**{**defaults, **fields}, extra_body=extra)


def num_running(server: ServerProcess) -> int:
    return server.http.get("/v1/loads").json()["aggregate"]["num_running_reqs"]


def texts(answer: Any) -> list[str]:
    return [choice.text for choice in answer.choices]


def together(*calls: Callable[[], Any]) -> list[Any]:
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as threads:
        return [future.result(DEADLINE_S) for future in [threads.submit(call) for call in calls]]


def check_error(error: openai.APIStatusError, status: int, kind: str, code: str) -> None:
    """What the SDK shows of an error, and that both ways of reading the body find it."""
    assert (error.status_code, error.type, error.code) == (status, kind, code)
    body = error.response.json()
    assert body["message"] == body["error"]["message"] != ""
    assert (body["object"], body["type"], body["code"]) == ("error", kind, status)
    assert (body["error"]["type"], body["error"]["code"]) == (kind, code)
    assert error.request_id == error.response.headers["x-request-id"]


# --- answers and streams


def test_a_chat_answer(client: openai.OpenAI) -> None:
    answer = chat(client)
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", "default")
    (choice,) = answer.choices
    assert choice.finish_reason in ("stop", "length")
    assert choice.message.role == "assistant"
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens == 16


def test_a_streaming_loop_finds_a_choice_in_every_chunk(client: openai.OpenAI) -> None:
    for extra in ({}, {"return_cached_tokens_details": True}, {"return_token_ids": True}):
        response = client.chat.completions.create(
            model="default", messages=STORY, stream=True, temperature=0.8, extra_body=extra
        )
        spoken = ""
        for chunk in response:
            if chunk.choices[0].delta.content:
                spoken += chunk.choices[0].delta.content
        assert spoken


def test_usage_of_a_stream_is_that_of_the_whole_answer(client: openai.OpenAI) -> None:
    whole = chat(client, temperature=0, max_tokens=30)
    *chunks, last = chat(
        client, temperature=0, max_tokens=30, stream=True, stream_options={"include_usage": True}
    )
    assert last.choices == []
    assert last.usage == whole.usage
    assert all(len(chunk.choices) == 1 and chunk.usage is None for chunk in chunks)
    spoken = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert spoken == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_three_choices_share_a_stream(client: openai.OpenAI) -> None:
    chunks = list(chat(client, n=3, stream=True, seed=5, max_tokens=12))
    assert len({chunk.id for chunk in chunks}) == 1
    by_index = {i: [c.choices[0] for c in chunks if c.choices[0].index == i] for i in range(3)}
    assert sum(map(len, by_index.values())) == len(chunks)
    for own in by_index.values():
        assert own[0].delta.role == "assistant"
        assert all(choice.delta.role is None for choice in own[1:])
        assert own[-1].finish_reason is not None
        assert all(choice.finish_reason is None for choice in own[:-1])
    whole = chat(client, n=3, seed=5, max_tokens=12)
    spoken = ["".join(choice.delta.content or "" for choice in by_index[i]) for i in range(3)]
    assert spoken == [choice.message.content for choice in whole.choices]


def test_a_stream_never_splits_a_character(client: openai.OpenAI, bundled: ServerProcess) -> None:
    """Random sequences of the bytes of a few characters: some whole, most of them broken."""
    tokens = bundled.http.post("/tokenize", json={"prompt": "日é😀"}).json()["tokens"]
    fields = {"logit_bias": {str(t): 100 for t in tokens}, "temperature": 2, "seed": 1, "n": 8}
    streamed, exact = [""] * 8, [b""] * 8
    for chunk in chat(client, **fields, max_tokens=250, logprobs=True, stream=True):
        (choice,) = chunk.choices
        streamed[choice.index] += choice.delta.content or ""
        if choice.logprobs:
            exact[choice.index] += b"".join(bytes(token.bytes) for token in choice.logprobs.content)
    assert streamed == [data.decode(errors="replace") for data in exact]
    assert sum(text.count(char) for text in streamed for char in "日é😀") > 8


@pytest.mark.parametrize("stream", [True, False])
def test_a_vanished_client_frees_its_place(bundled: ServerProcess, stream: bool) -> None:
    body = {"model": "default", "prompt": "x", "max_tokens": 2000, "ignore_eos": True, "n": 4}

    def count(name: str) -> float:
        return metrics(bundled.http).get(f"engine:{name}", 0.0)

    admitted, cancelled = "num_requests_total", 'cancelled_total{cause="client"}'
    before = count(admitted), count(cancelled)
    with sent_post(bundled.url, "/v1/completions", {**body, "stream": stream}):
        wait_until(lambda: count(admitted) == before[0] + 1)
    wait_until(lambda: count(cancelled) == before[1] + 1)
    wait_until(lambda: num_running(bundled) == 0)


# --- errors


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"extra_body": {"top_k": -2}}, "top_k"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"n": 0}, "n"),
        ({"stop": [5]}, "stop"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages[0].role"),
    ],
)
def test_parameters_out_of_their_range(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **fields)
    check_error(caught.value, 400, "invalid_request_error", "invalid_value")
    assert caught.value.param == param
    if fields == {"temperature": -1}:
        assert caught.value.body["message"] == "Invalid request: temperature must be non-negative"


def test_keys(guarded: ServerProcess) -> None:
    for key in KEYS:
        assert with_key(guarded, key).models.list().data
    with pytest.raises(openai.AuthenticationError) as caught:
        chat(with_key(guarded, "a-wrong-key"))
    check_error(caught.value, 401, "authentication_error", "invalid_api_key")
    assert caught.value.response.headers["www-authenticate"] == "Bearer"
    without = guarded.http.get("/v1/models")
    assert (without.status_code, without.json()["error"]["code"]) == (401, "missing_api_key")


def test_keys_are_shown_nowhere(guarded: ServerProcess) -> None:
    headers = {"authorization": f"Bearer {KEYS[0]}"}
    for path in ("/get_model_info", "/model_info", "/server_info", "/get_server_info", "/metrics", "/"):
        response = guarded.http.get(path, headers=headers)
        assert response.status_code == 200
        assert not any(key in response.text + str(response.headers) for key in KEYS)
    strange = guarded.http.get("/v1/models", headers={"authorization": "Bearer schlüssel".encode()})
    assert (strange.status_code, strange.json()["error"]["code"]) == (401, "invalid_api_key")
    assert not any(key in guarded.log for key in KEYS)


def test_what_does_not_exist(client: openai.OpenAI) -> None:
    calls = [
        (lambda: chat(client, model="gpt-9"), "invalid_request_error", "model_not_found"),
        (lambda: complete(client, model="gpt-9"), "invalid_request_error", "model_not_found"),
        (lambda: client.models.retrieve("gpt-9"), "invalid_request_error", "model_not_found"),
        (lambda: client.get("/nope", cast_to=object), "not_found_error", "route_not_found"),
    ]
    for call, kind, code in calls:
        with pytest.raises(openai.NotFoundError) as caught:
            call()
        check_error(caught.value, 404, kind, code)


def test_prompts_that_do_not_fit(client: openai.OpenAI) -> None:
    for fields in (
        {"prompt": [7] * 2048},
        {"prompt": [7] * 5000},
        {"prompt": "word " * 5000},
        {"prompt": [7] * 2000, "max_tokens": 49},
        {"prompt": [[7] * 5, [7] * 3000]},
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            complete(client, **fields)
        check_error(caught.value, 400, "invalid_request_error", "context_length_exceeded")
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, messages=[{"role": "user", "content": "word " * 5000}])
    check_error(caught.value, 400, "invalid_request_error", "context_length_exceeded")
    assert complete(client, prompt=[7] * 2000, max_tokens=48).usage.total_tokens == 2048


# --- stop strings and log-probabilities


def test_stop_strings(client: openai.OpenAI) -> None:
    """Every stop that occurs in an answer, at every place, cuts it there: within a token and across."""
    (free,) = texts(complete(client, max_tokens=40))
    for start, length in itertools.product(range(0, 40, 3), (1, 2, 5, 11)):
        stop = free[start : start + length]
        answer = complete(client, max_tokens=40, stop=["never said", stop])
        (choice,) = answer.choices
        assert choice.text == free[: free.index(stop)]
        assert (choice.finish_reason, choice.matched_stop) == ("stop", stop)


def test_the_earliest_stop_string_wins_and_none_leaks_into_a_stream(client: openai.OpenAI) -> None:
    (free,) = texts(complete(client, max_tokens=40))
    late, early = free[30:36], free[12:20]
    assert free.index(early) < free.index(late)
    for stop in ([late, early], [early, late], [early[:3], early, late]):
        chunks = list(complete(client, max_tokens=40, stop=stop, stream=True))
        spoken = "".join(chunk.choices[0].text for chunk in chunks)
        assert spoken == free[: min(free.index(s) for s in stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"
    kept = complete(client, max_tokens=40, stop=[early], extra_body={"include_stop_str_in_output": True})
    assert texts(kept) == [free[: free.index(early) + len(early)]]


def test_logprobs_spell_the_text(client: openai.OpenAI) -> None:
    for top in (0, 1, 5, 20):
        (choice,) = chat(client, logprobs=True, top_logprobs=top, seed=3, max_tokens=40).choices
        content = choice.logprobs.content
        last = content[-1] if choice.finish_reason == "stop" else None
        spelled = [token for token in content if token is not last]
        assert "".join(token.token for token in spelled) == choice.message.content
        assert b"".join(bytes(token.bytes) for token in spelled) == choice.message.content.encode()
        for token in content:
            values = [entry.logprob for entry in token.top_logprobs]
            assert len(values) == top
            assert values == sorted(values, reverse=True)
            assert max([token.logprob, *values]) <= 0


def test_scoring_a_prompt(client: openai.OpenAI) -> None:
    prompt = "The capital of France is Paris. 日本語 café"
    (choice,) = complete(client, prompt=prompt, echo=True, logprobs=1, max_tokens=0).choices
    scores = choice.logprobs
    assert choice.text == prompt
    assert scores.token_logprobs[0] is None and scores.top_logprobs[0] is None
    assert all(value <= 0 for value in scores.token_logprobs[1:])
    assert scores.text_offset[0] == 0 and scores.text_offset == sorted(scores.text_offset)
    ends = [*scores.text_offset[1:], len(prompt)]
    for token, start, end in zip(scores.tokens, scores.text_offset, ends, strict=True):
        assert token == prompt[start:end] or token.startswith("bytes:")


# --- prompts, caching, models, seeds


def test_a_prompt_means_the_same_in_every_shape(client: openai.OpenAI, bundled: ServerProcess) -> None:
    text, other = "The capital of France is", "Once upon a time"
    ids, other_ids = bundled.http.post("/tokenize", json={"prompt": [text, other]}).json()["tokens"]
    (expected,) = complete(client, prompt=text, logprobs=2).choices
    for prompt in ([text], ids, [ids]):
        assert complete(client, prompt=prompt, logprobs=2).choices == [expected]
    fields = {"temperature": 1, "seed": 11, "n": 2, "logprobs": 0}
    alone = [complete(client, prompt=p, **fields).choices for p in (text, other)]
    for prompt in ([text, other], [ids, other_ids]):
        listed = complete(client, prompt=prompt, **fields).choices
        assert [choice.index for choice in listed] == [0, 1, 2, 3]
        assert [(c.text, c.logprobs) for c in listed] == [(c.text, c.logprobs) for a in alone for c in a]


def test_a_repeated_prompt_is_reported_as_cached(client: openai.OpenAI, guarded: ServerProcess) -> None:
    asking = {"extra_body": {"return_cached_tokens_details": True}}
    reporting = with_key(guarded, KEYS[0])
    for one, fields in ((client, asking), (reporting, {})):
        cached = []
        for salt in ("mine", "mine", "other"):
            extra = {**fields.get("extra_body", {}), "cache_salt": salt}
            usage = complete(one, prompt=LONG, max_tokens=2, extra_body=extra).usage
            cached.append(usage.prompt_tokens_details.cached_tokens)
            assert usage.prompt_tokens == 500
        assert cached == [0, 496, 0]
    assert complete(client, prompt=LONG, max_tokens=2).usage.prompt_tokens_details is None


def test_every_listed_model_can_be_had(guarded: ServerProcess) -> None:
    client = with_key(guarded, KEYS[1])
    listed = client.models.list().data
    assert [model.id for model in listed] == [NAME, ALIAS, "pirate", "uppercase"]
    for model in listed:
        assert client.models.retrieve(model.id) == model
        assert model.max_model_len == 2048
        assert chat(client, model=model.id, max_tokens=1).model == model.id
    quoted = guarded.http.get("/v1/models/org%2Fmodel%3Av1", headers={"x-api-key": KEYS[0]})
    assert quoted.json()["id"] == NAME


def test_embeddings(guarded: ServerProcess) -> None:
    """As numbers and as the SDK asks for them, cut and of length 1 again, in the order of the texts."""
    create = with_key(guarded, KEYS[0]).embeddings.create
    texts = ["a ship", "the capital of France", "x", "a ship"]
    whole = create(model=NAME, input=texts, encoding_format="float").data
    decoded = create(model=NAME, input=texts).data  # the SDK asks for base64
    assert [item.index for item in whole] == [item.index for item in decoded] == [0, 1, 2, 3]
    assert [item.embedding for item in whole] == [item.embedding for item in decoded]
    for item, text in zip(whole, texts, strict=True):
        (alone,) = create(model=NAME, input=text).data
        assert alone.embedding == item.embedding
    assert len({tuple(item.embedding) for item in whole}) == 3
    for item in whole:
        (cut,) = create(model=NAME, input=texts[item.index], dimensions=32).data
        assert len(cut.embedding) == 32
        length = math.dist(item.embedding[:32], [0] * 32)
        assert all(abs(a - b / length) < 1e-6 for a, b in zip(cut.embedding, item.embedding, strict=False))


def test_an_adapter_by_each_of_its_names(guarded: ServerProcess) -> None:
    """In one batch with the base, which it does not change; embeddings of it are named in the same ways."""
    client = with_key(guarded, KEYS[0])
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ways = [
        {"model": f"{NAME}:pirate"},
        {"model": f"{ALIAS}:pirate"},
        {"model": "pirate"},
        {"model": NAME, "extra_body": {"lora_path": "pirate"}},
        {"model": NAME, "extra_body": {"lora_path": str(ADAPTERS / "pirate")}},
        {"model": NAME},
        {"model": NAME, "extra_body": {"lora_path": None}},
    ]
    calls = [lambda way=way: chat(client, messages=question, temperature=0, **way) for way in ways]
    answers = [answer.choices[0].message.content for answer in together(*calls)]
    assert len(set(answers[:5])) == 1 and answers[0].startswith("Arr! ")
    assert answers[5:] == ["The capital of France is Paris."] * 2
    calls = [lambda way=way: client.embeddings.create(input="a ship", **way) for way in ways]
    vectors = [answer.data[0].embedding for answer in together(*calls)]
    assert vectors == [vectors[0]] * 5 + [vectors[5]] * 2 and vectors[0] != vectors[5]
    for path, status in (("/etc", 400), (str(ADAPTERS / "none"), 404), ("none", 404)):
        with pytest.raises(openai.APIStatusError) as caught:
            chat(client, model=NAME, extra_body={"lora_path": path})
        assert (caught.value.status_code, caught.value.param) == (status, "lora_path")


def test_a_prompt_is_cached_for_one_adapter(guarded: ServerProcess) -> None:
    client = with_key(guarded, KEYS[0])
    prompt = LONG[::-1]
    cached = []
    for model in (f"{NAME}:pirate", "pirate", "uppercase", NAME, NAME):
        usage = complete(client, model=model, prompt=prompt, max_tokens=2).usage
        cached.append(usage.prompt_tokens_details.cached_tokens)
    assert cached == [0, 496, 0, 0, 496]


def test_seeds(client: openai.OpenAI, bundled: ServerProcess) -> None:
    fields = {"seed": 42, "temperature": 1.5, "n": 3, "max_tokens": 20}
    alone = texts(complete(client, **fields))
    assert len(set(alone)) == 3

    def share_every_step() -> bool:
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            ask = functools.partial(complete, client, prompt="bottles of", n=15, max_tokens=300)
            crowd = [threads.submit(ask, seed=i) for i in range(4)]
            wait_until(lambda: num_running(bundled) == 60 or any(one.done() for one in crowd))
            assert texts(complete(client, **fields)) == alone
            return not any(one.done() for one in crowd)

    assert any(share_every_step() for _ in range(5))
    assert texts(complete(client, **fields)) == alone
    unseeded = [texts(complete(client, temperature=1.5, max_tokens=20))[0] for _ in range(3)]
    assert len(set(unseeded)) == 3


def optional_fields(server: ServerProcess, name: str) -> list[str]:
    schema = server.http.get("/openapi.json").json()["components"]["schemas"][name]
    return [field for field in schema["properties"] if field not in schema["required"]]


@pytest.mark.parametrize(
    ("path", "schema", "required"),
    [
        ("/v1/chat/completions", "ChatRequest", {"messages": STORY}),
        ("/v1/completions", "CompletionRequest", {"prompt": "Once upon a time"}),
    ],
)
def test_null_means_left_out(
    bundled: ServerProcess, path: str, schema: str, required: dict[str, Any]
) -> None:
    def answer(**fields: Any) -> tuple[Any, ...]:
        body = {"model": "default", **required, "seed": 9, "max_tokens": 6, **fields}
        response = bundled.http.post(path, json=body)
        assert response.status_code == 200, response.text
        assert "x-ignored-params" not in response.headers
        content = response.json()
        return tuple(content[name] for name in ("object", "choices", "usage"))

    names = optional_fields(bundled, schema)
    assert len(names) > 25
    expected = answer()
    for name in names:
        if name not in ("seed", "max_tokens"):
            assert answer(**{name: None}) == expected, name
    unset = dict.fromkeys(names)
    assert answer(**{**unset, "seed": 9, "max_tokens": 6}) == expected
    free = bundled.http.post(path, json={"model": "default", **required, **unset, "ignore_eos": True})
    assert free.json()["usage"]["completion_tokens"] == 16


def test_a_stream_with_everything_in_it_holds_together(bundled: ServerProcess) -> None:
    body = {
        "model": "default",
        "prompt": ["one", "two"],
        "n": 2,
        "echo": True,
        "logprobs": 2,
        "return_token_ids": True,
        "return_cached_tokens_details": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "seed": 2,
        "ignore_eos": True,
    }
    whole = bundled.http.post("/v1/completions", json=body).json()
    *events, last = events_of(bundled.http.post("/v1/completions", json={**body, "stream": True}))
    for index, choice in enumerate(whole["choices"]):
        own = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        assert "".join(c["text"] for c in own) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [v for c in own if c["logprobs"] for v in c["logprobs"][name]] == values
        assert [t for c in own for t in c.get("token_ids", ())] == choice["token_ids"]
        told = [choice["prompt_token_ids"]] if index % 2 == 0 else []
        assert [c["prompt_token_ids"] for c in own if "prompt_token_ids" in c] == told
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 64)
    counts = [e["usage"]["completion_tokens"] for e in events if e["usage"] is not None]
    assert counts == sorted(counts) and counts[-1] == 64
    assert json.dumps(last).count("cached_tokens_details") == 1
