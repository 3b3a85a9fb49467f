"""Structured output over HTTP: every way to ask, the SDK's own helpers, and constraints that mean harm."""

from __future__ import annotations

import concurrent.futures
import contextlib
import enum
import json
import re
import threading
import time
from typing import Any

import httpx
import jsonschema
import jsonschema_rs
import openai
import psutil
import pydantic
import pytest

from helpers.random_schemas import random_schema
from helpers.regexes import REGEXES
from helpers.server_process import ServerProcess

MODEL = "default"
MESSAGES = [{"role": "user", "content": "Tell me about a person, as JSON."}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"type": "string", "format": "email"},
    },
    "required": ["name", "age"],
}


@pytest.fixture(scope="module")
def server():
    with ServerProcess("--grammar-timeout", "2") as process:
        process.wait_ready()
        yield process


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return server.sdk()


def json_schema(schema, **fields):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **fields}}


def chat(client, **fields):
    extra = {name: fields.pop(name) for name in list(fields) if name not in SDK_FIELDS}
    fields = {"temperature": 1, "seed": 3, "max_tokens": 300} | fields
    return client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_body=extra, **fields)


SDK_FIELDS = {
    "response_format",
    "n",
    "stream",
    "logprobs",
    "top_logprobs",
    "max_tokens",
    "logit_bias",
    "seed",
}


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


# --- refusals


def post(server, **fields) -> httpx.Response:
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 5, **fields}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)


@pytest.mark.parametrize(
    ("fields", "param", "what"),
    [
        ({"regex": "(a"}, "regex", "position 2"),
        ({"regex": r"(a)\1"}, "regex", "position 3"),
        ({"regex": "a$b"}, "regex", "position"),
        ({"regex": "a{1000000}"}, "regex", "a?{1000000} at position 1"),
        ({"regex": "(" * 5000 + "a" + ")" * 5000}, "regex", "position 500"),
        ({"regex": "xa{2,1}"}, "regex", "{2,1} at position 2"),
        ({"regex": r"[a-c\]-][9-0]"}, "regex", "[9-0] at position 8"),
        ({"regex": "a[^]b]"}, "regex", "has to be escaped: [^] at position 1"),
        ({"regex": r"a\ud800"}, "regex", r"half of a character: \ud800 at position 1"),
        ({"ebnf": r'root ::= "\ud800"'}, "ebnf", r"half of a character: \ud800 at position 10"),
        ({"json_schema": r'{"const": "\ud800"}'}, "json_schema", r"a character: \ud800 at position 11"),
        ({"ebnf": "no rule at all"}, "ebnf", "line 1"),
        ({"ebnf": 'start ::= "a"'}, "ebnf", "root"),
        ({"choice": []}, "choice", "non-empty"),
        ({"choice": "a"}, "choice", "array"),
        ({"choice": [1]}, "choice", "strings"),
        ({"json_schema": '{"anyOf":[' * 2000}, "json_schema", "4000 levels at character 19999"),
        ({"response_format": json_schema({"properties": {"a": False}})},
         "response_format.json_schema.schema", "false at #/properties/a"),
        ({"response_format": json_schema({"properties": {"a": {"oneOf": [True, True]}}})},
         "response_format.json_schema.schema", '"oneOf" at #/properties/a'),
        ({"response_format": json_schema({"properties": {"a": {"type": "string", "pattern": "(?!b)"}}})},
         "response_format.json_schema.schema", "(?! at position 0 at #/properties/a/pattern"),
        ({"json_schema": "{"}, "json_schema", "not valid JSON"),
        ({"json_schema": '{"type": "number", "minimum": NaN}'}, "json_schema", "NaN is no number"),
        ({"structural_tag": {"type": "nothing"}}, "structural_tag", "a format"),
        ({"structural_tag": {"type": "structural_tag", "format": {
            "type": "json_schema", "json_schema": {"not": {}}}}}, "structural_tag", '"not" at #'),
        ({"response_format": {"type": "structural_tag", "format": {"type": "any_text", "max_chars": 3}}},
         "response_format", '"max_chars" at #/format'),
        ({"response_format": {"type": "xml"}}, "response_format.type", "one of"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}},
         "response_format.json_schema.schema", "required"),
        ({"response_format": json_schema(PERSON, strict=1)}, "response_format.json_schema.strict", "true"),
        ({"response_format": json_schema({"not": {}})}, "response_format.json_schema.schema", '"not" at #'),
        ({"response_format": json_schema({"$ref": "#/$defs/a", "$defs": {"a": {
            "type": "object", "properties": {"b": {"$ref": "#/$defs/a"}}, "required": ["b"]}}})},
         "response_format.json_schema.schema", '"$ref" at #'),
        ({"response_format": json_schema({"properties": {"a": {"contains": {}}}})},
         "response_format.json_schema.schema", '"contains" at #/properties/a'),
        ({"regex": "a", "ebnf": "b"}, "ebnf", "only one"),
        ({"regex": "a", "response_format": {"type": "json_object"}}, "regex", "only one"),
        ({"regex": "a" * 300_000}, "regex", "too large"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(server, fields, param, what):
    response = post(server, **fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param and what.replace("a?", "") in error["message"]
    assert post(server, stream=True, **fields).status_code == 400


@pytest.mark.parametrize("name", ["regex", "ebnf", "json_schema", "choice"])
def test_half_of_a_character(server, client, name):
    body = json.dumps({"model": MODEL, "messages": MESSAGES, name: "a\ud800"})
    response = server.http.post("/v1/chat/completions", content=body)
    assert response.status_code == 400 and response.json()["error"]["code"] == "invalid_json"
    assert chat(client, regex="ok").choices[0].message.content == "ok"


def deep(schema, depth):
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


BOMBS = [
    {"regex": "(a+)+$"},
    {"regex": "(x+x+)+y"},
    {"regex": "(.*a){60}"},
    {"regex": "((a{100}){100}){100}"},
    {"regex": f"({'|'.join(['a*'] * 2000)})*b"},
    {"regex": "(" * 499 + "a" + "*)" * 499},
    {"ebnf": 'root ::= "a" root'},
    {"ebnf": 'root ::= "a"{1000000}'},
    {"regex": "(a|b|ab)*" * 40 + "c{1,60000}"},
    {"regex": "[a-z]{0,60000}[0-9]{0,60000}"},
    {"response_format": json_schema({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"})},
    {"response_format": json_schema(deep({"type": "integer"}, 150))},
    {"json_schema": '{"type":"array","items":' * 5000 + "true" + "}" * 5000},
    {"response_format": json_schema({"type": "object", "properties": {
        f"p{i}": {"type": "string", "minLength": 1, "maxLength": 128} for i in range(3000)}})},
    {"response_format": json_schema({"enum": [f"value {i}" for i in range(10_000)]})},
    {"response_format": json_schema({"anyOf": [
        {"type": "string", "pattern": f"^(a|{i}){{1,60000}}$"} for i in range(50)]})},
    {"ebnf": "root ::= root root | root root root | \"a\" | root"},
    {"ebnf": 'root ::= ' + "(" * 20_000 + '"a"' + ")" * 20_000},
    {"ebnf": "\n".join(f'r{i} ::= r{i + 1} r{i + 1}' for i in range(60)) + '\nr60 ::= "a"\nroot ::= r0'},
]  # fmt: skip


SAYS_WHERE = re.compile(r'(position|line|character) [0-9]|"[$a-zA-Z]+" at #')
"""A keyword or a position, also where time, memory or the compiler's stack ran out."""


def test_bombs_harm_nobody_else(server, client):
    """Each is answered or refused in time; a stream that runs beside them keeps its pace."""
    gaps, stop = [], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            last = time.monotonic()
            for _ in client.completions.create(
                model=MODEL, prompt="x", max_tokens=100, stream=True, extra_body={"ignore_eos": True}
            ):
                now = time.monotonic()
                gaps.append(now - last)
                last = now

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for fields in BOMBS:
            began = time.monotonic()
            response = post(server, **fields)
            assert response.status_code in (200, 400), response.text
            assert time.monotonic() - began < 15
            if response.status_code == 400:
                error = response.json()["error"]
                assert error["param"]
                assert SAYS_WHERE.search(error["message"]), error["message"]
    finally:
        stop.set()
        watcher.join()
    assert len(gaps) > 100
    assert max(gaps) < 1.0, "a step, or the server, was held up"
    assert chat(client, regex="ok").choices[0].message.content == "ok"


def test_many_slow_constraints_let_quick_ones_pass(server):
    """Four that would each be tried until the time limit hold up none that takes no time."""
    branches = "|".join(["a*"] * 2000)
    answered, begun = [], threading.Barrier(5)

    def ask(number: int) -> None:
        begun.wait(30)
        assert "longer than" in post(server, regex=f"({branches})*b{number}").text
        answered.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    begun.wait(30)
    deadline = time.monotonic() + 10
    while len(trials(server)) < 2:  # the others are sent by then, or soon
        assert time.monotonic() < deadline
    for word in ("quick", "again"):  # when two slow ones are tried because nobody else waits, too
        assert post(server, regex=word).json()["choices"][0]["message"]["content"] == word
        assert len(answered) <= 1
    for thread in threads:
        thread.join()
    assert len(answered) == 4


def test_a_client_that_leaves_while_its_constraint_compiles_is_forgotten(server, client):
    slow = json_schema(
        {"anyOf": [{"type": "string", "pattern": f"^([ab{i}]|c)*d{{1,60000}}$"} for i in range(300)]}
    )
    with pytest.raises(httpx.ReadTimeout):
        body = {"model": MODEL, "messages": MESSAGES, "response_format": slow}
        httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=httpx.Timeout(5, read=0.02))
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        load = httpx.get(f"{server.url}/v1/loads").json()
        if '"num_waiting_reqs":0' in json.dumps(load).replace(" ", "") and trials(server) == []:
            break
        time.sleep(0.02)
    else:
        raise AssertionError(f"still waiting: {load}")
    assert chat(client, regex="ok").choices[0].message.content == "ok"


def helpers(server) -> list[psutil.Process]:
    """The grammar helper, and the trials that it forked."""
    found = []
    for process in psutil.Process(server.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # a trial that has just ended
            if "engine.grammar.helper" in process.cmdline():
                found.append(process)
    return found


def trials(server) -> list[psutil.Process]:
    return helpers(server)[1:]


def test_a_helper_that_is_killed_comes_back(server, client):
    assert chat(client, regex="one").choices[0].message.content == "one"
    (helper,) = helpers(server)
    helper.kill()
    helper.wait(10)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        response = post(server, regex="two")
        if response.status_code == 200:
            break
        assert response.status_code == 500  # the one that met the dead helper
    assert response.json()["choices"][0]["message"]["content"] == "two"


def test_an_idle_engine_starts_the_helper_before_it_is_needed():
    with ServerProcess() as process:
        process.wait_ready()
        deadline = time.monotonic() + 30
        while not helpers(process):
            assert time.monotonic() < deadline, "no helper, and nobody has asked for anything"
            time.sleep(0.05)
        assert chat(process.sdk(), regex="ok").choices[0].message.content == "ok"


def test_the_server_process_does_not_load_the_compiler(server):
    with open(f"/proc/{server.process.pid}/maps") as file:
        assert "xgrammar" not in file.read()
