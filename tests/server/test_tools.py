"""Tool calls over HTTP: a model that plays recorded tokens, in each format."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.config.server_config import ServerConfig
from engine.text.formats.known import TOOL_FORMATS
from helpers.errors import check_error
from helpers.http_server import EOS, Server, events_of, write_model
from helpers.outputs import RIGHT, WRONG, template_writing

FORMATS = sorted(set(TOOL_FORMATS) - {"qwen25"})
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
ADD = {"type": "function", "function": {"name": "add"}}
TOOLS = [WEATHER, ADD]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """A server for each format. What marks calls are special tokens, but for Hermes, as in real models."""
    started: dict[str, Server] = {}
    for name in FORMATS:
        special = () if name == "hermes" else TOOL_FORMATS[name].markers
        path = write_model(tmp_path_factory.mktemp(name), template=template_writing(name), special=special)
        started[name] = Server(path).__enter__()
    yield started
    for server in started.values():
        server.__exit__()


@pytest.fixture
def server(servers: dict[str, Server]) -> Iterator[Server]:
    hermes = servers["hermes"]
    hermes.reset()
    yield hermes
    hermes.wait_idle()


def message_of(response: httpx.Response) -> dict[str, Any]:
    """The message without the ids of its calls, which are checked; and why it ended."""
    (choice,) = response.json()["choices"]
    message = choice["message"]
    for call in message.get("tool_calls", ()):
        assert re.fullmatch(r"call_[0-9a-f]{24}", call.pop("id"))
        assert call.pop("type") == "function"
    return {**message, "finish_reason": choice["finish_reason"]}


def streamed_message(response: httpx.Response) -> dict[str, Any]:
    """The same from the deltas of a stream, as a client puts them together."""
    message: dict[str, Any] = {"role": None, "content": None}
    for event in events_of(response):
        (choice,) = event["choices"]
        for name, value in choice["delta"].items():
            if name != "tool_calls":
                message[name] = (message.get(name) or "") + value if value is not None else None
                continue
            (part,) = value
            calls = message.setdefault("tool_calls", [])
            if part["index"] == len(calls):
                assert re.fullmatch(r"call_[0-9a-f]{24}", part["id"]) and part["type"] == "function"
                assert part["function"] == {"name": part["function"]["name"], "arguments": ""}
                calls.append({"function": part["function"]})
            else:
                assert part.keys() == {"index", "function"} and part["index"] == len(calls) - 1
                calls[-1]["function"]["arguments"] += part["function"]["arguments"]
        message["finish_reason"] = choice["finish_reason"]
    return message


def expected(meaning: Any) -> dict[str, Any]:
    calls = [{"function": {"name": name, "arguments": text}} for name, text in meaning.calls]
    return {
        "role": "assistant",
        "content": meaning.content or None,
        "tool_calls": calls,
        "finish_reason": "tool_calls",
    }


# --- formats


@pytest.mark.parametrize("name", FORMATS)
def test_the_format_is_found_and_shown(servers: dict[str, Server], name: str) -> None:
    assert servers[name].get("/get_model_info").json()["tool_call_parser"] == name


@pytest.mark.parametrize(("name", "text", "meaning"), RIGHT)
def test_calls_at_every_border_of_chunks(
    servers: dict[str, Server], name: str, text: str, meaning: Any
) -> None:
    server = servers[name]
    server.reset()
    server.set_reply(text)
    ids = server.ids(text)
    if name != "hermes":
        assert len(ids) < len(text.encode()) or name in ("llama3", "pythonic"), "markers are single tokens"
    wanted = expected(meaning)
    assert message_of(server.chat(tools=TOOLS)) == wanted
    assert streamed_message(server.chat(tools=TOOLS, stream=True)) == wanted
    for cut in range(1, len(ids) + 1):
        server.engine.cuts = frozenset([cut])
        assert message_of(server.chat(tools=TOOLS)) == wanted
        assert streamed_message(server.chat(tools=TOOLS, stream=True)) == wanted


@pytest.mark.parametrize(("name", "text"), WRONG)
def test_what_is_no_call_is_content(servers: dict[str, Server], name: str, text: str) -> None:
    server = servers[name]
    server.reset()
    server.set_reply(text)
    message = message_of(server.chat(tools=TOOLS))
    assert message == {"role": "assistant", "content": text, "finish_reason": "stop"}
    streamed = streamed_message(server.chat(tools=TOOLS, stream=True))
    assert (streamed["content"], streamed["finish_reason"]) == (text, "stop")


def test_a_limit_inside_a_call(server: Server) -> None:
    server.set_reply(CALL)
    num_tokens = len(CALL) - len("}}\n</tool_call>")
    response = server.chat(tools=TOOLS, max_tokens=num_tokens)
    wanted = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1'}}],
        "finish_reason": "length",
    }
    assert message_of(response) == wanted
    assert streamed_message(server.chat(tools=TOOLS, max_tokens=num_tokens, stream=True)) == wanted


def test_a_stop_string_inside_a_call_leaves_text(server: Server) -> None:
    server.set_reply(CALL)
    message = message_of(server.chat(tools=TOOLS, stop=['"a"']))
    assert message["finish_reason"] == "stop" and "tool_calls" not in message
    assert CALL.startswith(message["content"])


def test_choices_have_their_own_calls(server: Server) -> None:
    replies = [CALL, "Just text.", CALL.replace("1", "2") + CALL]
    server.set_reply(lambda _request, choice: [*server.ids(replies[choice]), EOS])
    choices = server.chat(tools=TOOLS, n=3).json()["choices"]
    found = [
        [call["function"]["arguments"] for call in choice["message"].get("tool_calls", [])]
        for choice in choices
    ]
    assert found == [['{"a": 1}'], [], ['{"a": 2}', '{"a": 1}']]
    assert [choice["finish_reason"] for choice in choices] == ["tool_calls", "stop", "tool_calls"]
    ids = [call["id"] for choice in choices for call in choice["message"].get("tool_calls", [])]
    assert len(set(ids)) == 3


def test_every_token_keeps_its_score_and_id(server: Server) -> None:
    text = f"So: {CALL}"
    server.set_reply(text)
    asked: dict[str, Any] = {"tools": TOOLS, "logprobs": True, "return_token_ids": True}
    (choice,) = server.chat(**asked).json()["choices"]
    events = [event["choices"][0] for event in events_of(server.chat(**asked, stream=True))]
    scores = [entry for event in events if event["logprobs"] for entry in event["logprobs"]["content"]]
    assert scores == choice["logprobs"]["content"]
    assert bytes(byte for entry in scores for byte in entry["bytes"]).decode() == text
    assert [i for event in events for i in event.get("token_ids", [])] == choice["token_ids"]
    assert not any("content" in event["delta"] for event in events[6:])


def test_the_sdk_puts_a_stream_of_calls_together(server: Server) -> None:
    server.set_reply(f"Well.\n{CALL}{CALL}")
    asked: Any = {"model": "default", "messages": [{"role": "user", "content": "x"}], "tools": TOOLS}
    with server.sdk().chat.completions.stream(**asked) as stream:
        names = [event.type for event in stream]
        message = stream.get_final_completion().choices[0].message
    assert names.count("tool_calls.function.arguments.done") == 2
    assert message.content == "Well."
    assert [call.function.arguments for call in message.tool_calls or []] == ['{"a": 1}'] * 2
    whole = server.sdk().chat.completions.create(**asked).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert [call.function.name for call in whole.message.tool_calls or []] == ["add", "add"]


# --- what is asked


def test_tools_are_shown_to_the_model_as_they_were_taught(server: Server) -> None:
    tool = {"function": {"strict": False, "parameters": {"type": "object"}, "name": "f"}, "type": "function"}
    server.chat(tools=[tool, ADD])
    shown = [
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},
        {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}},
    ]
    prompt = server.prompt_text(server.engine.submitted[0])
    assert prompt == "".join(json.dumps(tool) + ";" for tool in shown) + "u:Hi;a:"


def test_a_tool_without_a_description_is_shown_where_templates_need_one(tmp_path: Path) -> None:
    template = template_writing("hermes").replace(
        "{{ t | tojson }}", "{{ t.function.name + t.function.description }}"
    )
    with Server(write_model(tmp_path, template=template)) as server:
        assert server.chat(tools=[ADD]).status_code == 200
        assert server.prompt_text(server.engine.submitted[-1]) == "add;u:Hi;a:"


def test_without_a_choice_tools_are_neither_shown_nor_read(server: Server) -> None:
    server.set_reply(CALL)
    for fields in ({"tools": TOOLS, "tool_choice": "none"}, {"tools": []}, {}):
        assert message_of(server.chat(max_tokens=99, **fields))["content"] == CALL
    assert {server.prompt_text(request) for request in server.engine.submitted} == {"u:Hi;a:"}


def test_only_allowed_tools_can_be_called(server: Server) -> None:
    server.set_reply(CALL)
    names = [{"type": "function", "function": {"name": "get_weather"}}]
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": names}}
    assert message_of(server.chat(tools=TOOLS, tool_choice=allowed))["content"] == CALL
    assert "add" in server.prompt_text(server.engine.submitted[0])


def test_calls_and_results_go_back_to_the_model(server: Server) -> None:
    def ask(arguments: Any) -> str:
        call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": arguments}}
        messages = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "2"}]},
        ]
        assert server.chat(messages=messages).status_code == 200
        return server.prompt_text(server.engine.submitted[-1])

    prompt = f"u:x;a:{CALL};t:2;a:"
    assert ask('{"a": 1}') == ask('{"a":1}') == ask({"a": 1}) == prompt
    assert ask("not JSON") == prompt.replace('{"a": 1}', '"not JSON"')
    assert ask("") == ask(None) == prompt.replace('{"a": 1}', "{}")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": [1]}, "tools"),
        ({"tools": [{}]}, "tools[0].type"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": 'a"b'}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a" * 65}}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]},
            "tools[0].function.parameters",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "strict": "yes"}}]},
            "tools[0].function.strict",
        ),
        ({"tools": [ADD, ADD]}, "tools[1].function.name"),
        ({"tools": [{**ADD, "function": {"name": f"f{i}"}} for i in range(129)]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "add"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": 1}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.function"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}},
            "tool_choice",
        ),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": []}}},
            "tool_choice.allowed_tools.tools",
        ),
        ({"tools": TOOLS, "parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ],
)
def test_wrong_tools_are_refused(server: Server, fields: dict[str, Any], param: str) -> None:
    response = server.chat(**fields)
    assert response.status_code == 400
    assert response.json()["param"] == param, response.text
    assert not server.engine.submitted


@pytest.mark.parametrize(
    ("call", "param"),
    [
        ({}, "function"),
        ({"function": {}}, "function.name"),
        ({"function": {"name": "f", "arguments": 1}}, "function.arguments"),
        ({"type": "custom", "function": {"name": "f"}}, "type"),
    ],
)
def test_wrong_calls_in_messages_are_refused(server: Server, call: Any, param: str) -> None:
    response = server.chat(messages=[{"role": "assistant", "tool_calls": [call]}])
    assert response.status_code == 400
    assert response.json()["param"] == f"messages[0].tool_calls[0].{param}"


def test_a_model_that_is_shown_no_tools_refuses_them(tmp_path: Path) -> None:
    with Server(write_model(tmp_path)) as server:
        assert server.get("/get_model_info").json()["tool_call_parser"] is None
        check_error(server.chat(tools=TOOLS), 400, "unsupported_parameter", "tools")
        assert server.chat(tools=TOOLS, tool_choice="none").status_code == 200


def test_a_format_that_is_not_known_is_said_so_unless_text_is_wanted(tmp_path: Path) -> None:
    path = write_model(tmp_path, template=template_writing("hermes").replace("tool_call>", "my_call>"))
    with Server(path) as server:
        body = check_error(server.chat(tools=TOOLS), 400, "unsupported_parameter", "tools")
        assert "--tool-call-parser" in body["message"]
    with Server(path, config=ServerConfig(tool_call_parser="none"), reply=CALL) as server:
        assert message_of(server.chat(tools=TOOLS))["content"] == CALL
        check_error(
            server.chat(tools=TOOLS, tool_choice="required"), 400, "unsupported_parameter", "tool_choice"
        )
    with Server(path, config=ServerConfig(tool_call_parser="qwen25"), reply=CALL) as server:
        assert server.get("/get_model_info").json()["tool_call_parser"] == "hermes"
        assert message_of(server.chat(tools=TOOLS))["finish_reason"] == "tool_calls"
