"""Calls and thoughts of a model with random weights: only the constraint can make them right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from engine.text.formats import harmony
from helpers.http_server import write_model
from helpers.outputs import template_writing
from helpers.server_process import LLAMA, ServerProcess

THINK = ("<think>", "</think>")
DEEPSEEK = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
)
FORMATS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "hermes": ("qwen3", (*THINK, "<tool_call>", "</tool_call>")),
    "llama3": (None, ("<|python_tag|>",)),
    "mistral": ("mistral", ("[THINK]", "[/THINK]", "[TOOL_CALLS]", "[ARGS]")),
    "pythonic": ("qwen3", THINK),
    "deepseekv3": ("qwen3", (*THINK, *DEEPSEEK)),
    "deepseekv31": (None, DEEPSEEK),
    "gpt-oss": ("gpt-oss", harmony.MARKERS),
}
"""Of each format of calls: the format of thoughts that goes with it here, and the special tokens of both."""

OPENINGS = {"qwen3": "<think>", "mistral": "[THINK]"}
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["a", "b"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["kind", "count"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "take", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "stop"}},
]


@pytest.fixture(scope="module", params=sorted(FORMATS))
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    name = request.param
    thoughts, special = FORMATS[name]
    template = template_writing(name, thoughts)
    path = write_model(tmp_path_factory.mktemp(name), template=template, special=special)
    vocab_size = json.loads((path / "config.json").read_text())["vocab_size"]
    (path / "config.json").write_text(json.dumps({**LLAMA, "vocab_size": vocab_size}))
    with ServerProcess("--model-path", str(path), "--load-format", "dummy") as process:
        process.wait_ready()
        assert process.http.get("/get_model_info").json()["tool_call_parser"] == name
        yield process
        assert process.stop() == 0
        assert "Traceback" not in process.log


def ask(server: ServerProcess, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Go on"}]
    body = {"model": "default", "messages": messages, "max_tokens": 400, "temperature": 1, **fields}
    response = server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def parser_of(server: ServerProcess) -> str | None:
    return server.http.get("/get_model_info").json()["reasoning_parser"]


def test_demanded_calls_are_right(server: ServerProcess) -> None:
    called = set()
    bound = {} if parser_of(server) is None else {"thinking_budget": 20}  # it would think and think
    for seed in range(10):
        demand = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
        (choice,) = ask(server, **demand, **bound, seed=seed)["choices"]
        assert choice["finish_reason"] == "tool_calls", choice
        (call,) = choice["message"]["tool_calls"]
        called.add(call["function"]["name"])
        arguments = json.loads(call["function"]["arguments"])
        jsonschema.validate(arguments, SCHEMA if call["function"]["name"] == "take" else {"maxProperties": 0})
    assert called == {"take", "stop"}


def test_free_text_has_right_calls_or_none(server: ServerProcess) -> None:
    for seed in range(5):
        (choice,) = ask(server, tools=TOOLS, seed=seed)["choices"]
        for call in choice["message"].get("tool_calls", ()):
            if choice["finish_reason"] != "length":
                json.loads(call["function"]["arguments"])


def test_bounded_thoughts_before_a_constrained_answer(server: ServerProcess) -> None:
    parser = parser_of(server)
    budgets = {None: (), "gpt-oss": (0, 10, 11, 12, 30)}.get(parser, (0, 1, 2, 9))
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    opened = {"chat_template_kwargs": {"opening": OPENINGS[parser]}} if parser in OPENINGS else {}
    for budget in budgets:
        for variables in ({}, opened):
            answer = ask(server, thinking_budget=budget, response_format=form, seed=budget, **variables)
            (choice,) = answer["choices"]
            jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
            assert choice["finish_reason"] == "stop"
            num_thoughts = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
            # What closes thoughts that the prompt has begun takes a token in any case.
            assert num_thoughts <= (max(budget, 1) if variables else budget)


def test_bounded_thoughts_before_calls(server: ServerProcess) -> None:
    if parser_of(server) is None:
        return
    numbers = set()
    opening = OPENINGS.get(parser_of(server))
    for budget in (1, 11, 12, 40):
        for choice in ("required", "auto"):
            fields = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
            if opening is not None:
                fields["chat_template_kwargs"] = {"opening": opening}
            answer = ask(server, **fields, thinking_budget=budget, seed=budget, max_tokens=200)
            (found,) = answer["choices"]
            numbers.add(num_thoughts := answer["usage"]["completion_tokens_details"]["reasoning_tokens"])
            assert num_thoughts <= budget
            if choice == "required":
                assert found["finish_reason"] == "tool_calls", found
            if found["finish_reason"] == "tool_calls":
                json.loads(found["message"]["tool_calls"][0]["function"]["arguments"])
    assert max(numbers) > 11
