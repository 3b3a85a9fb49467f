"""Structured output over HTTP: every way to ask, and the SDK's own helpers."""

from __future__ import annotations

import concurrent.futures
import enum
import json
import re
import threading
from typing import Any

import jsonschema
import jsonschema_rs
import openai
import pydantic
import pytest

from helpers.constrained_chat import MESSAGES, MODEL, PERSON, chat, json_schema, serve_compiling_for
from helpers.random_schemas import random_schema
from helpers.regexes import REGEXES

server = pytest.fixture(scope="module")(serve_compiling_for(60))


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return server.sdk()


# --- every way to ask


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": json_schema(PERSON)},
        {"response_format": json_schema(PERSON, strict=False, description="a person")},
        {"json_schema": json.dumps(PERSON)},
        {"guided_json": PERSON},
        {"structured_outputs": {"json": PERSON}},
    ],
)
def test_schemas(client, fields):
    choice = chat(client, **fields).choices[0]
    jsonschema.validate(json.loads(choice.message.content), PERSON)
    assert choice.finish_reason == "stop"


@pytest.mark.parametrize("name", ["regex", "guided_regex", "structured_outputs"])
def test_a_phone_number(client, name):
    pattern = r"\d{3}-\d{3}-\d{4}"
    fields = {name: {"regex": pattern} if name == "structured_outputs" else pattern}
    choice = chat(client, **fields).choices[0]
    assert re.fullmatch(pattern, choice.message.content) and len(choice.message.content) == 12
    assert choice.finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"ebnf": 'root ::= "yes" | "no " [a-z]{2}'}, "yes|no [a-z]{2}"),
        ({"guided_grammar": 'root ::= "x"{3}'}, "xxx"),
        ({"structured_outputs": {"grammar": 'root ::= "x"{3}'}}, "xxx"),
        ({"choice": ["red", "dark blue"]}, "red|dark blue"),
        ({"guided_choice": ["red", "dark blue"]}, "red|dark blue"),
        ({"structured_outputs": {"choice": ["red", "dark blue"]}}, "red|dark blue"),
    ],
)
def test_grammars_and_choices(client, fields, pattern):
    assert re.fullmatch(pattern, chat(client, **fields).choices[0].message.content)


def test_json_objects_are_compact(server, client):
    """Whatever a model that likes spaces says."""
    (space,) = server.http.post("/tokenize", json={"prompt": " "}).json()["tokens"]
    num_whole = 0
    for seed in range(20):
        fields = {"response_format": {"type": "json_object"}, "seed": seed, "logit_bias": {str(space): 5}}
        (choice,) = chat(client, **fields).choices
        if choice.finish_reason == "stop":
            content = choice.message.content
            outside_of_strings = re.sub(r'"(?:[^"\\]|\\.)*"', "", content)
            assert isinstance(json.loads(content), dict) and not re.search(r"\s", outside_of_strings)
            num_whole += len(content) > 2
    assert num_whole > 2


def test_a_structural_tag(client):
    tag = {
        "type": "structural_tag",
        "format": {
            "type": "sequence",
            "elements": [
                {"type": "const_string", "value": "Well: "},
                {"type": "json_schema", "json_schema": {"type": "integer", "minimum": 1, "maximum": 9}},
            ],
        },
    }
    for fields in ({"response_format": tag}, {"structural_tag": tag}, {"structural_tag": json.dumps(tag)}):
        assert re.fullmatch("Well: [1-9]", chat(client, **fields).choices[0].message.content)


def test_completions_and_choices_of_their_own(client):
    answer = client.completions.create(
        model=MODEL, prompt=["a", "b"], n=3, max_tokens=30, extra_body={"regex": "[a-z]{3,5}!"}
    )
    assert len(answer.choices) == 6
    assert all(re.fullmatch("[a-z]{3,5}!", choice.text) for choice in answer.choices)
    assert len({choice.text for choice in answer.choices}) > 1


def test_streams_say_the_same(client):
    fields = {"response_format": json_schema(PERSON), "seed": 11, "n": 2}
    whole = chat(client, **fields)
    texts, reasons = ["", ""], [None, None]
    for chunk in chat(client, stream=True, **fields):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == ["stop", "stop"]


def test_log_probabilities_cover_the_text(client):
    answer = chat(client, response_format=json_schema(PERSON), logprobs=True, top_logprobs=2)
    entries = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == answer.choices[0].message.content
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in entries)
    assert answer.usage.completion_tokens == len(entries) + 1  # the end is counted, not shown


def test_log_probabilities_of_several_choices_in_streams(client):
    """Bitwise those of the whole answer, forced tokens included."""
    fields = {"response_format": json_schema(PERSON), "logprobs": True, "top_logprobs": 2, "n": 3}
    whole = chat(client, **fields)
    entries: list[list] = [[], [], []]
    for chunk in chat(client, stream=True, **fields):
        for choice in chunk.choices:
            entries[choice.index] += choice.logprobs.content if choice.logprobs else []
    assert entries == [choice.logprobs.content for choice in whole.choices]
    for choice, own in zip(whole.choices, entries, strict=True):
        assert "".join(entry.token for entry in own) == choice.message.content
        jsonschema.validate(json.loads(choice.message.content), PERSON)
    assert len({choice.message.content for choice in whole.choices}) > 1
    assert whole.usage.completion_tokens == sum(map(len, entries)) + 3


def test_a_cut_answer_says_so(client):
    choice = chat(client, response_format=json_schema(PERSON), max_tokens=3).choices[0]
    assert choice.finish_reason == "length"


def test_without_a_limit_the_answer_is_whole(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, response_format=json_schema(PERSON), seed=1
    )
    jsonschema.validate(json.loads(answer.choices[0].message.content), PERSON)


def test_free_and_constrained_requests_share_a_batch(client):
    """What a free request says does not depend on constrained neighbours."""
    alone = chat(client, seed=5, max_tokens=40).choices[0].message.content
    texts = {}

    def ask(number: int) -> None:
        fields = {"regex": "[0-9]{40}"} if number % 2 else {}
        texts[number] = chat(client, seed=5, max_tokens=40, **fields).choices[0].message.content

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(texts[number] == alone for number in range(0, 8, 2))


def test_what_is_drawn_at_temperature_1_is_right(client):
    """Schemas and regular expressions of every kind, several at a time, in streams and whole."""

    def answer(number: int, **fields: Any) -> tuple[str, str | None]:
        fields |= {"seed": number, "max_tokens": 1500, "temperature": 1}
        if number % 2:
            (choice,) = chat(client, **fields).choices
            return choice.message.content, choice.finish_reason
        choices = [chunk.choices[0] for chunk in chat(client, stream=True, **fields)]
        return "".join(c.delta.content or "" for c in choices), choices[-1].finish_reason

    def ask_schema(number: int) -> str | None:
        schema = random_schema(1000 + number)
        text, reason = answer(number, response_format=json_schema(schema))
        if reason == "stop":
            value = json.loads(text)
            jsonschema.validate(value, schema)
            jsonschema_rs.Draft202012Validator(schema, validate_formats=True).validate(value)
        return reason

    def ask_regex(number: int) -> str | None:
        text, reason = answer(number, regex=REGEXES[number])
        assert reason != "stop" or re.fullmatch(REGEXES[number], text), (REGEXES[number], text)
        return reason

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        of_schemas = threads.map(ask_schema, range(200))
        of_regexes = list(threads.map(ask_regex, range(len(REGEXES))))
        reasons = list(of_schemas)
    assert set(reasons) <= {"stop", "length"} and reasons.count("stop") >= 190, reasons
    assert set(of_regexes) <= {"stop", "length"} and of_regexes.count("stop") >= 0.95 * len(REGEXES)


# --- what comes before what


def test_the_constraint_comes_before_bias_and_minimum(client):
    answer = chat(client, regex="a{3}", min_tokens=50, ignore_eos=True, logit_bias={"67": -100})
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("aaa", "stop")


def test_a_stop_string_ends_it_early(client):
    text = chat(client, regex="abc-[0-9]{3}-xyz", stop_token_ids=[], stop="-x").choices[0].message.content
    assert re.fullmatch("abc-[0-9]{3}", text)


# --- the SDK's own


class Mood(enum.Enum):
    GOOD = "good"
    BAD = "bad"


class Address(pydantic.BaseModel):
    street: str = pydantic.Field(max_length=15)
    number: int = pydantic.Field(ge=1, le=99)


class Report(pydantic.BaseModel):
    title: str = pydantic.Field(max_length=20)
    mood: Mood
    addresses: list[Address] = pydantic.Field(max_length=2)
    note: str | None = pydantic.Field(default=None, max_length=10)


def test_parse(client):
    answer = client.chat.completions.parse(
        model=MODEL, messages=MESSAGES, response_format=Report, max_tokens=400, seed=2
    )
    report = answer.choices[0].message.parsed
    assert isinstance(report, Report) and report.mood in Mood


def test_the_streaming_helper(client):
    with client.chat.completions.stream(
        model=MODEL, messages=MESSAGES, response_format=Report, max_tokens=400, seed=2
    ) as stream:
        kinds = {event.type for event in stream}
        report = stream.get_final_completion().choices[0].message.parsed
    assert isinstance(report, Report)
    assert {"content.delta", "content.done"} <= kinds
