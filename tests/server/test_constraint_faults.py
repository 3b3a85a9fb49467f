"""Constraints that are wrong or mean harm, over HTTP: each is refused, and nobody else notices."""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time

import httpx
import openai
import psutil
import pytest

from helpers.constrained_chat import (
    MESSAGES,
    MODEL,
    PERSON,
    chat,
    endless_regex,
    json_schema,
    post,
    serve_compiling_for,
)
from helpers.http_server import DEADLINE_S, wait_until
from helpers.kept_waiting import kept_waiting_s
from helpers.server_process import ServerProcess

server = pytest.fixture(scope="module")(serve_compiling_for(2))


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return server.sdk()


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
    pids = os.getpid(), server.process.pid, server.engine.pid

    def clock_s() -> float:
        """Stands still while they are kept waiting: others use the machine as well."""
        return time.monotonic() - kept_waiting_s(*pids)

    def watch() -> None:
        while not stop.is_set():
            last = clock_s()
            for _ in client.completions.create(
                model=MODEL, prompt="x", max_tokens=100, stream=True, extra_body={"ignore_eos": True}
            ):
                now = clock_s()
                gaps.append(now - last)
                last = now

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for fields in BOMBS:
            response = post(server, **fields)  # which waits so long and no longer
            assert response.status_code in (200, 400), response.text
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

    def have_passed(attempt: int) -> bool:
        answered, begun = [], threading.Barrier(5)

        def ask(number: int) -> None:
            begun.wait(DEADLINE_S)
            assert "longer than" in post(server, regex=endless_regex(f"{attempt}{number}")).text
            answered.append(number)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        begun.wait(DEADLINE_S)
        wait_until(lambda: len(trials(server)) == 2 or len(answered) == 4)  # the others are sent soon
        for word in ("quick", "again"):  # when two slow ones are tried because nobody else waits, too
            word += str(attempt)
            assert post(server, regex=word).json()["choices"][0]["message"]["content"] == word
        num_before = len(answered)
        for thread in threads:
            thread.join()
        assert len(answered) == 4
        return num_before <= 1

    # Whoever kept this test itself from running does not do so each time.
    assert any(have_passed(attempt) for attempt in range(3))


def test_a_client_that_leaves_while_its_constraint_compiles_is_forgotten(server, client):
    slow = json_schema(
        {"anyOf": [{"type": "string", "pattern": f"^([ab{i}]|c)*d{{1,60000}}$"} for i in range(300)]}
    )
    with pytest.raises(httpx.ReadTimeout):
        body = {"model": MODEL, "messages": MESSAGES, "response_format": slow}
        patience = httpx.Timeout(DEADLINE_S, read=0.02)
        httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=patience)

    def is_forgotten() -> bool:
        load = server.http.get("/v1/loads").json()["aggregate"]
        return load["num_waiting_reqs"] == 0 and trials(server) == []

    wait_until(is_forgotten)
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
    (helper,) = helpers(server)  # a trial has ended before its verdict is said
    helper.kill()
    helper.wait(DEADLINE_S)
    statuses = []

    def is_back() -> bool:
        response = post(server, regex="two")
        statuses.append(response.status_code)
        return statuses[-1] == 200 and response.json()["choices"][0]["message"]["content"] == "two"

    wait_until(is_back)
    assert set(statuses) <= {500, 200}, "500: the one that met the dead helper"


def test_an_idle_engine_starts_the_helper_before_it_is_needed():
    with ServerProcess() as process:
        process.wait_ready()
        wait_until(lambda: bool(helpers(process)))  # and nobody has asked for anything
        assert chat(process.sdk(), regex="ok").choices[0].message.content == "ok"


def test_the_server_process_does_not_load_the_compiler(server):
    with open(f"/proc/{server.process.pid}/maps") as file:
        assert "xgrammar" not in file.read()
