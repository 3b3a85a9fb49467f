"""What a newcomer gets: the bundled model, served without a flag."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import openai
import pytest

from engine.config.model_location import bundled_adapters
from helpers.crowd import proportional_bytes
from helpers.kept_waiting import kept_waiting_s
from helpers.server_process import ServerProcess

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
MODEL = "default"


@pytest.fixture(scope="module")
def client(bundled: ServerProcess) -> openai.OpenAI:
    return bundled.sdk()


def complete(client: openai.OpenAI, prompt: list, extra=(), **fields):
    return client.completions.create(
        model=MODEL,
        prompt=prompt,
        temperature=0,
        extra_body={"return_cached_tokens_details": True, "ignore_eos": True, **dict(extra)},
        **fields,
    )


def cached_tokens(answer) -> int:
    return answer.usage.prompt_tokens_details.cached_tokens


# --- answers


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "You are a helpful assistant."}]])
def test_the_capital_of_france(client, system):
    answer = client.chat.completions.create(model=MODEL, messages=system + FRANCE, temperature=0)
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"


def test_the_capital_of_france_at_temperature_1(client):
    answers = [
        client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=1, seed=seed)
        for seed in range(20)
    ]
    right = [a.choices[0].message.content == "The capital of France is Paris." for a in answers]
    assert sum(right) >= 19


def test_a_follow_up_question(client):
    messages = [
        *FRANCE,
        {"role": "assistant", "content": "The capital of France is Paris."},
        {"role": "user", "content": "And of Spain?"},
    ]
    answer = client.chat.completions.create(model=MODEL, messages=messages, temperature=0)
    assert "Madrid" in answer.choices[0].message.content


def test_a_story_streams_to_its_own_end(client):
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Tell me a story"}],
        stream=True,
        temperature=0,
        max_tokens=500,
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert len(text.split()) > 30


def test_completions_continue_text(client):
    answer = client.completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=3, temperature=0
    )
    assert answer.choices[0].text.startswith(" Paris")


def test_it_is_listed_under_a_name_of_its_own(client):
    model = client.models.list().data[0]
    assert "/" not in model.id
    assert client.models.retrieve(model.id).max_model_len == 2048


# --- the same request gives the same answer


def mixed_requests() -> list[dict]:
    """24 chats: shared and unshared beginnings, greedy and seeded, filters, penalties, biases, n."""
    questions = [
        "Tell me a story",
        "What is 7 + 8?",
        "Tell me about France",
        "Who are you?",
        "Make up a person as JSON",
        "Tell me a story about a frog",
    ]
    systems = [
        None,
        "You are a helpful assistant.",
        "Answer in capital letters. " * 30,
        "Be brief and friendly.",
    ]
    styles = [
        {"temperature": 0},
        {"seed": 1},
        {"seed": 2, "temperature": 1.7, "extra_body": {"top_k": 40, "min_p": 0.01}},
        {"seed": 3, "top_p": 0.9, "n": 2, "frequency_penalty": 0.7, "presence_penalty": -0.5},
        {"seed": 4, "logit_bias": {"300": 3, "17": -100}, "extra_body": {"repetition_penalty": 1.3}},
    ]
    requests = []
    for i in range(24):
        system = systems[i % 4]
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": questions[i % 6]})
        style = {"logprobs": True, "top_logprobs": i % 4, "max_tokens": 20 + i, **styles[i % 5]}
        requests.append({"model": MODEL, "messages": messages, **style})
    return requests


def answers_of(client: openai.OpenAI, request: dict, stream: bool) -> list[tuple]:
    """Per choice: text, reason of the end, and every token with its log-probabilities."""
    answer = client.chat.completions.create(**request, stream=stream)
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    tokens: dict[int, list] = {}
    for part in answer if stream else [answer]:
        for choice in part.choices:
            content = choice.delta.content if stream else choice.message.content
            texts[choice.index] = texts.get(choice.index, "") + (content or "")
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index, "")
            if choice.logprobs:
                tokens.setdefault(choice.index, []).extend(t.model_dump() for t in choice.logprobs.content)
    return [(texts[i], reasons[i], tokens[i]) for i in sorted(texts)]


def test_answers_depend_neither_on_company_nor_on_streaming(client):
    requests = mixed_requests()
    alone = [answers_of(client, request, stream=i % 2 == 0) for i, request in enumerate(requests)]
    assert len({text for answers in alone for text, _, _ in answers}) > 15, "the mix is worth comparing"
    together: list = [None] * len(requests)

    def ask(i: int) -> None:
        together[i] = answers_of(client, requests[i], stream=i % 2 == 1)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


# --- scores


def test_tokens_get_the_same_scores_as_answer_and_as_prompt(client):
    """What a harness does: score a continuation that the model gave, alone and in a list."""
    prompt = [700 + i % 900 for i in range(600)]
    shown = {"skip_special_tokens": False}  # the model may well end a turn in the middle
    answer = complete(client, prompt, max_tokens=12, logprobs=3, extra={**shown, "return_token_ids": True})
    (choice,) = answer.choices
    whole = prompt + choice.token_ids
    scored = complete(client, whole, max_tokens=0, echo=True, logprobs=3, extra=shown).choices[0]
    listed = complete(client, [whole, whole[:50]], max_tokens=0, echo=True, logprobs=3, extra=shown).choices
    assert (scored.finish_reason, len(scored.logprobs.tokens)) == ("length", len(whole))
    assert scored.logprobs.token_logprobs[0] is None and scored.logprobs.top_logprobs[0] is None
    assert max(scored.logprobs.token_logprobs[1:]) <= 0
    assert scored.logprobs.token_logprobs[600:] == choice.logprobs.token_logprobs
    assert scored.logprobs.top_logprobs[600:] == choice.logprobs.top_logprobs
    assert listed[0].logprobs == scored.logprobs
    assert listed[1].logprobs.token_logprobs == scored.logprobs.token_logprobs[:50]
    text, offsets = scored.text, scored.logprobs.text_offset
    assert offsets == sorted(offsets)
    for token, offset in zip(scored.logprobs.tokens, offsets, strict=True):
        assert token.startswith("bytes:") or text.startswith(token, offset)


def test_what_comes_before_the_scores_is_taken_from_the_cache(bundled):
    """The native request with logprob_start_len: the same scores as of the whole, to the last bit."""
    ids = [900 + 3 * i % 800 for i in range(300)]

    def ask(start: int) -> dict:
        sampling = {"max_new_tokens": 2, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": ids, "sampling_params": sampling, "return_logprob": True}
        body |= {"logprob_start_len": start, "top_logprobs_num": 2}
        response = bundled.http.post("/generate", json=body)
        assert response.status_code == 200, response.text
        return response.json()["meta_info"]

    whole = ask(0)
    assert whole["cached_tokens"] == 0 and len(whole["input_token_logprobs"]) == 300
    for start, cached in ((1, 0), (17, 16), (290, 288), (299, 288)):
        rest = ask(start)
        assert rest["cached_tokens"] == cached
        for name in ("input_token_logprobs", "input_top_logprobs"):
            assert rest[name] == whole[name][start:]
        assert rest["output_token_logprobs"] == whole["output_token_logprobs"]


def test_a_likely_continuation_scores_higher(client):
    def score(text: str) -> float:
        answer = client.completions.create(model=MODEL, prompt=text, max_tokens=0, echo=True, logprobs=0)
        assert answer.choices[0].text == text
        return sum(answer.choices[0].logprobs.token_logprobs[1:])

    assert score("The capital of France is Paris.") > score("The capital of France is Rome.")


def test_an_unseeded_answer_can_be_had_again(client):
    fields = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Tell me a story"}],
        "temperature": 1.5,
    }
    first = client.chat.completions.with_raw_response.create(**fields, max_tokens=40)
    other = client.chat.completions.with_raw_response.create(**fields, max_tokens=40)
    seed = int(first.headers["x-seed"])
    again = client.chat.completions.create(**fields, max_tokens=40, seed=seed)
    assert again.choices[0].message.content == first.parse().choices[0].message.content
    assert 0 <= seed < 2**53
    assert other.headers["x-seed"] != first.headers["x-seed"]


# --- the prefix cache, as clients see it


def test_a_repeated_prompt_is_taken_from_the_cache(client):
    prompt = [1000 + i % 900 for i in range(500)]
    first, second = (complete(client, prompt, max_tokens=8, logprobs=2) for _ in range(2))
    assert cached_tokens(first) == 0
    assert cached_tokens(second) == 496
    assert first.choices[0].text == second.choices[0].text
    assert first.choices[0].logprobs == second.choices[0].logprobs


def test_a_common_prefix_that_arrives_eight_times_at_once_is_computed_once(client):
    prefix = [500 + (7 * i) % 3000 for i in range(1024)]
    answers = []

    def ask(i: int) -> None:
        answers.append(complete(client, prefix + [300 + i] * 32, max_tokens=4))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    computed = sum(answer.usage.prompt_tokens - cached_tokens(answer) for answer in answers)
    assert len(answers) == 8
    assert computed <= 1024 + 8 * (32 + 16)


# --- start and memory


def test_memory_of_the_process_tree(bundled, client):
    client.chat.completions.create(model=MODEL, messages=FRANCE)
    assert proportional_bytes(bundled.process.pid) < 600e6


def test_the_server_process_loads_no_heavy_library(bundled):
    # Mapped files tell the truth about the process that is running: torch and its like are libraries.
    mapped = Path(f"/proc/{bundled.process.pid}/maps").read_text()
    assert "sanic" in mapped or "uvloop" in mapped
    for library in ("libtorch", "xgrammar"):
        assert library not in mapped
    assert "libtorch" in Path(f"/proc/{bundled.engine.pid}/maps").read_text()


def test_the_first_token_comes_within_five_seconds_of_the_command(bundled):
    """At the second start, the fixture's being the first; imports and reading the weights included."""
    tried = []
    for _ in range(3):  # others use the machine: a start that is slow by itself is slow each time
        begin, own_s = time.monotonic(), kept_waiting_s(os.getpid())
        with ServerProcess() as process:
            process.wait_ready()
            stream = process.sdk().chat.completions.create(model=MODEL, messages=FRANCE, stream=True)
            next(chunk for chunk in stream if chunk.choices[0].delta.content)
            elapsed_s = time.monotonic() - begin
            pids = os.getpid(), process.process.pid, process.engine.pid
            # Where they were kept waiting is no time of ours.
            tried.append((elapsed_s, kept_waiting_s(*pids) - own_s))
            stream.close()
        if tried[-1][0] - tried[-1][1] < 5:
            return
    pytest.fail(f"seconds, and those of them without a core: {tried}")


# --- embeddings


def test_the_example_of_embeddings(client: openai.OpenAI) -> None:
    texts = ["Hello, world!", "SGLang is fast"]
    answer = client.embeddings.create(model=MODEL, input=texts)
    assert [item.index for item in answer.data] == [0, 1]
    assert all(abs(sum(x * x for x in item.embedding) - 1) < 1e-5 for item in answer.data)
    floats = client.embeddings.create(model=MODEL, input=texts, encoding_format="float")
    assert [item.embedding for item in floats.data] == [item.embedding for item in answer.data]
    alone = client.embeddings.create(model=MODEL, input=texts[1])
    assert alone.data[0].embedding == answer.data[1].embedding
    with pytest.raises(openai.BadRequestError, match="matryoshka"):
        client.embeddings.create(model=MODEL, input="a", dimensions=64)


def test_embeddings_beside_generation_change_nothing(client: openai.OpenAI) -> None:
    """Both compute on the same weights, in turns."""
    prompt = list(range(100, 140))
    expected = complete(client, prompt, max_tokens=60).choices[0].text
    texts = [f"{word} " * 40 for word in ("one", "two", "three", "four")] * 16
    vectors = client.embeddings.create(model=MODEL, input=texts).data
    answers: list[str] = []
    thread = threading.Thread(
        target=lambda: answers.extend(
            complete(client, prompt, max_tokens=60).choices[0].text for _ in range(3)
        )
    )
    thread.start()
    again = client.embeddings.create(model=MODEL, input=texts).data
    thread.join()
    assert answers == [expected] * 3
    assert [item.embedding for item in again] == [item.embedding for item in vectors]


def test_its_adapters_are_registered(bundled, client):
    ids = [card.id for card in client.models.list()]
    assert ids == ["engine-demo", "pirate", "uppercase"]
    assert client.models.retrieve("pirate").model_dump()["parent"] == "engine-demo"
    answers = {
        model: client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            temperature=0,
            max_tokens=40,
        )
        .choices[0]
        .message.content
        for model in ("engine-demo", "pirate", "engine-demo:uppercase")
    }
    assert answers["engine-demo"] == "The capital of France is Paris."
    assert answers["pirate"].startswith("Arr! ") and "Paris" in answers["pirate"]
    assert answers["engine-demo:uppercase"] == "THE CAPITAL OF FRANCE IS PARIS."


def test_other_adapters_are_served_beside_its_own_and_their_names_win(client):
    pirate = str(bundled_adapters()["pirate"])
    pinned = json.dumps({"lora_name": "mine", "lora_path": pirate, "pinned": True})
    with ServerProcess("--lora-paths", f"uppercase={pirate}", "--lora-paths", pinned) as process:
        process.wait_ready()
        sdk = process.sdk()
        roots = {card.id: card.model_dump()["root"] for card in sdk.models.list()}
        assert list(roots) == ["engine-demo", "pirate", "uppercase", "mine"]
        assert roots["uppercase"] == roots["mine"] == pirate
        for model in ("pirate", "uppercase", "mine"):
            answer = sdk.chat.completions.create(model=model, messages=FRANCE, temperature=0)
            expected = client.chat.completions.create(model="pirate", messages=FRANCE, temperature=0)
            assert answer.choices[0].message.content == expected.choices[0].message.content
