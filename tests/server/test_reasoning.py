"""Thoughts over HTTP: parted from the answer, counted, and given back to the model."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from engine.config.server_config import ServerConfig
from engine.sampling.constraint import Thinking, ThoughtMessages
from helpers.errors import check_error
from helpers.http_server import EOS, Server, events_of, write_model
from helpers.outputs import template_writing

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
ADD = {"type": "function", "function": {"name": "add"}}
SPECIAL = {
    "qwen3": (),
    "mistral": ("[THINK]", "[/THINK]"),
    "gpt-oss": ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>", "<|call|>"),
}
TEXTS = {
    "qwen3": "<think>\nHm, é 🙂?\n</think>\n\nFour.",
    "mistral": "[THINK]Hm, é 🙂?[/THINK]Four.",
    "gpt-oss": "<|channel|>analysis<|message|>Hm, é 🙂?<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Four.",
}
LAST_THOUGHT = {"qwen3": "</think>", "mistral": "[/THINK]", "gpt-oss": "<|end|>"}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    started: dict[str, Server] = {}
    for name, special in SPECIAL.items():
        template = template_writing("hermes", thoughts=name)
        path = write_model(tmp_path_factory.mktemp(name), template=template, special=special)
        started[name] = Server(path).__enter__()
    yield started
    for server in started.values():
        server.__exit__()


@pytest.fixture
def server(servers: dict[str, Server]) -> Iterator[Server]:
    thinking = servers["qwen3"]
    thinking.reset()
    thinking.set_reply(TEXTS["qwen3"])
    yield thinking
    thinking.wait_idle()


def ask(server: Server, **fields: Any) -> httpx.Response:
    return server.chat(**{"max_tokens": 500, **fields})


def message_of(response: httpx.Response) -> dict[str, Any]:
    return response.json()["choices"][0]["message"]


def streamed(response: httpx.Response) -> tuple[str, str]:
    """Thoughts and content from the deltas; no content before the thoughts are over."""
    thoughts = content = ""
    for event in events_of(response):
        delta = event["choices"][0]["delta"]
        if "reasoning_content" in delta:
            assert not content
            thoughts += delta["reasoning_content"]
        content += delta.get("content") or ""
    return thoughts, content


@pytest.mark.parametrize("name", TEXTS)
def test_thoughts_at_every_border_of_chunks(servers: dict[str, Server], name: str) -> None:
    server = servers[name]
    server.reset()
    server.set_reply(TEXTS[name])
    assert server.get("/get_model_info").json()["reasoning_parser"] == name
    wanted = {"role": "assistant", "content": "Four.", "reasoning_content": "Hm, é 🙂?"}
    for cut in range(1, len(server.ids(TEXTS[name])) + 1):
        server.engine.cuts = frozenset([cut])
        assert message_of(ask(server)) == wanted
        assert streamed(ask(server, stream=True)) == ("Hm, é 🙂?", "Four.")


@pytest.mark.parametrize("name", TEXTS)
def test_tokens_of_thoughts_are_counted(servers: dict[str, Server], name: str) -> None:
    server = servers[name]
    server.reset()
    server.set_reply(TEXTS[name])
    text, last = TEXTS[name], LAST_THOUGHT[name]
    num_thoughts = len(server.ids(text[: text.rindex(last) + len(last)]))
    usage = ask(server).json()["usage"]
    assert usage["completion_tokens"] == len(server.ids(text)) + 1
    assert usage["completion_tokens_details"] == {"reasoning_tokens": num_thoughts}
    *_, last_event = events_of(ask(server, stream=True, stream_options={"include_usage": True}))
    assert last_event["usage"] == usage
    server.set_reply("No thoughts." if name == "qwen3" else "")
    assert ask(server).json()["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("fields", [{}, {"stop": ["Four"]}, {"logprobs": True, "n": 2}])
def test_how_tokens_arrive_makes_no_difference_to_their_number(
    servers: dict[str, Server], name: str, fields: dict[str, Any]
) -> None:
    server, counts = servers[name], []
    for cuts in (None, frozenset(), frozenset([5, 19])):
        server.reset()
        server.set_reply(TEXTS[name])
        server.call(lambda cuts=cuts: setattr(server.engine, "cuts", cuts))
        counts.append(ask(server, **fields).json())
    assert len({json.dumps([answer["usage"], answer["choices"]]) for answer in counts}) == 1
    assert counts[0]["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    server.reset()


def test_tokens_of_every_choice_are_counted(server: Server) -> None:
    server.set_reply(lambda _request, choice: [*server.ids(f"<think>{'x' * choice}</think>y"), EOS])
    usage = ask(server, n=3).json()["usage"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 3 * len("<think></think>") + 3}


def test_the_text_can_be_left_whole(server: Server) -> None:
    response = ask(server, separate_reasoning=False)
    assert message_of(response) == {"role": "assistant", "content": TEXTS["qwen3"]}
    assert response.json()["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    assert streamed(ask(server, separate_reasoning=False, stream=True)) == ("", TEXTS["qwen3"])


def test_thoughts_can_come_in_one_piece(server: Server) -> None:
    for text in (TEXTS["qwen3"], "<think>Without an end"):
        server.set_reply(text)
        events = list(events_of(ask(server, stream=True, stream_reasoning=False)))
        deltas = [event["choices"][0]["delta"] for event in events]
        (thoughts,) = [delta["reasoning_content"] for delta in deltas if "reasoning_content" in delta]
        assert thoughts in ("Hm, é 🙂?", "Without an end")
    assert len(deltas) == 3


def test_the_prompt_may_open_the_thoughts(server: Server) -> None:
    server.set_reply("Hm.\n</think>Four.")
    variables = {"chat_template_kwargs": {"opening": "<think>\n"}}
    assert message_of(ask(server, **variables))["reasoning_content"] == "Hm."
    assert message_of(ask(server))["content"] == "Hm.\n</think>Four."
    closed = {"chat_template_kwargs": {"opening": "<think>\n\n</think>\n\n"}}
    server.set_reply("Four.")
    assert message_of(ask(server, **closed)) == {"role": "assistant", "content": "Four."}


def test_a_message_that_is_continued_may_stand_in_its_thoughts(server: Server) -> None:
    def continued(content: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": content}]
        return message_of(ask(server, messages=messages, continue_final_message=True))

    server.set_reply("so.</think>Four.")
    for content in ("<think>It is ", [{"type": "text", "text": "<think>It is "}]):
        assert continued(content)["reasoning_content"] == "so."
    assert continued("It is ")["content"] == "so.</think>Four."
    assert continued("<think>a</think>b")["content"] == "so.</think>Four."


def test_thoughts_of_earlier_answers_go_back_to_the_model(server: Server) -> None:
    for name in ("reasoning_content", "reasoning"):
        assert ask(server, messages=[{"role": "assistant", "content": "b", name: "a"}]).status_code == 200
        assert server.prompt_text(server.engine.submitted[-1]) == "a:a</think>b;a:"
    response = ask(server, messages=[{"role": "assistant", "content": "b", "reasoning_content": 1}])
    assert response.status_code == 400
    assert response.json()["param"] == "messages[0].reasoning_content"


def test_a_call_behind_thoughts(server: Server) -> None:
    server.set_reply(f"<think>I add.</think>\n\n{CALL}")
    (choice,) = ask(server, tools=[ADD]).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert choice["message"]["reasoning_content"] == "I add."


def test_a_limit_inside_the_thoughts(server: Server) -> None:
    (choice,) = ask(server, max_tokens=12).json()["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"] == {"role": "assistant", "content": "", "reasoning_content": "Hm,"}


def test_effort_reaches_the_template(server: Server) -> None:
    prompts = []
    for fields in (
        {"reasoning_effort": "none"},
        {"reasoning_effort": "low"},
        {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ):
        assert ask(server, **fields).status_code == 200
        prompts.append(server.prompt_text(server.engine.submitted[-1]))
    assert prompts == ["u:Hi;a:quick", "u:Hi;a:", "u:Hi;a:", "u:Hi;a:quick"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"reasoning_effort": 1}, "reasoning_effort"),
        ({"separate_reasoning": "no"}, "separate_reasoning"),
        ({"stream_reasoning": 0}, "stream_reasoning"),
        ({"thinking_budget": -1}, "thinking_budget"),
        ({"thinking_budget": "1"}, "thinking_budget"),
        ({"thinking_budget": 1, "thinking_token_budget": -2}, "thinking_token_budget"),
    ],
)
def test_wrong_fields_are_refused(server: Server, fields: dict[str, Any], param: str) -> None:
    response = ask(server, **fields)
    assert response.status_code == 400
    assert response.json()["param"] == param


def test_the_engine_is_told_of_thoughts_where_it_has_to_know(servers: dict[str, Server]) -> None:
    def told(name: str, **fields: Any) -> Any:
        server = servers[name]
        server.set_reply(TEXTS[name])
        response = ask(server, **fields)
        assert response.status_code == 200, response.text
        return server.engine.submitted[-1].params.thinking

    for name in SPECIAL:
        assert told(name) is None
    (start,), (end,) = servers["mistral"].ids("[THINK]"), servers["mistral"].ids("[/THINK]")
    blank = np.array(sorted([EOS, *servers["mistral"].ids(string.whitespace)]), "<i4").tobytes()
    assert told("mistral", thinking_budget=5) == Thinking((end,), start, 5, (end,), blank)
    assert told("mistral", thinking_token_budget=0) == Thinking((end,), start, 0, (end,), blank)
    assert told("mistral", regex="a") == Thinking((end,), start, None, (end,), blank)
    assert told("mistral", tools=[ADD]) == Thinking((end,), start, None, (end,), blank)
    shown = told("mistral", regex="a", skip_special_tokens=False)
    assert shown.blank == blank[4:], "the end token is text then"
    opened = {"chat_template_kwargs": {"opening": "[THINK]"}}
    assert told("mistral", regex="a", **opened) == Thinking((end,), None, None, (end,))

    (channel,), (ended,) = servers["gpt-oss"].ids("<|channel|>"), servers["gpt-oss"].ids("<|end|>")
    bounded = ThoughtMessages(channel=channel, end=ended, budget=50)
    assert told("gpt-oss", thinking_budget=50) == bounded
    assert told("gpt-oss", thinking_budget=50, tools=[ADD], tool_choice="none") == bounded
    begun = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    response = ask(servers["gpt-oss"], messages=begun, continue_final_message=True, thinking_budget=50)
    check_error(response, 400, "unsupported_parameter", "thinking_budget")
    # The constraint covers the messages of thoughts.
    assert told("gpt-oss", regex="a") is None


def test_tags_that_are_no_tokens(server: Server) -> None:
    assert ask(server, regex="a").status_code == 200
    assert server.engine.submitted[-1].params.thinking is None
    check_error(ask(server, thinking_budget=5), 400, "unsupported_parameter", "thinking_budget")
    opened = {"chat_template_kwargs": {"opening": "<think>"}}
    check_error(ask(server, regex="a", **opened), 400, "unsupported_parameter", "regex")


def test_an_answer_that_begins_like_thoughts(server: Server) -> None:
    """Marked by letters, no thoughts come before a constrained answer: all of it is content."""
    choices = ["<think>yes</think>no"]
    server.set_reply(choices[0])
    assert message_of(ask(server, choice=choices))["content"] == choices[0]
    assert message_of(ask(server))["reasoning_content"] == "yes"
    check_error(ask(server, choice=choices, thinking_budget=5), 400, "unsupported_parameter", "choice")


def test_nor_do_they_beside_tools_whose_calls_nobody_reads(tmp_path: Path) -> None:
    path, answer = write_model(tmp_path, template=template_writing("hermes", "qwen3")), "<think>yes</think>no"
    with Server(path, config=ServerConfig(tool_call_parser="none"), reply=answer) as server:
        assert message_of(ask(server, choice=[answer], tools=[ADD]))["content"] == answer


def test_parsers_can_be_named(tmp_path: Path) -> None:
    path = write_model(tmp_path)
    with Server(path, config=ServerConfig(reasoning_parser="deepseek-r1"), reply="a</think>b") as server:
        assert server.get("/get_model_info").json()["reasoning_parser"] == "deepseek-r1"
        assert message_of(ask(server)) == {"role": "assistant", "content": "b", "reasoning_content": "a"}
        check_error(ask(server, reasoning_effort="low"), 400, "unsupported_parameter", "reasoning_effort")
    path = write_model(tmp_path, template=template_writing("hermes", "qwen3"))
    with Server(path, config=ServerConfig(reasoning_parser="none"), reply="<think>a</think>b") as server:
        assert server.get("/get_model_info").json()["reasoning_parser"] is None
        assert message_of(ask(server))["content"] == "<think>a</think>b"
        assert "completion_tokens_details" not in ask(server).json()["usage"]
        for fields in ({}, {"tools": [ADD]}):  # whatever it thinks, nothing would hold it to that
            for name in ("thinking_budget", "thinking_token_budget"):
                response = ask(server, **{name: 5}, **fields)
                check_error(response, 400, "unsupported_parameter", "thinking_budget")


def test_intervals_of_a_stream_change_nothing(tmp_path: Path) -> None:
    path = write_model(tmp_path, template=template_writing("hermes", "qwen3"))
    with Server(path, config=ServerConfig(stream_interval=7), reply=TEXTS["qwen3"]) as server:
        assert streamed(ask(server, stream=True)) == ("Hm, é 🙂?", "Four.")
