"""Every field of a request, row by row: what it does left out, at its default, and at both ends of its range.

The table is complete, or a test fails: fields that ask for more than a range are in ELSEWHERE, by the test
that shows what they do.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.server.openapi import SCHEMAS
from helpers.http_server import events_of
from helpers.server_process import ServerProcess

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BOTH = (CHAT, COMPLETIONS)
STORY = [{"role": "user", "content": "Tell me a story"}]
CONTEXT, VOCAB = 2048, 4096
FORCE = 100
LARGEST = 2**63 - 1
TABLE: dict[str, Row] = {}

ELSEWHERE = {
    "test_conformance.py::test_an_adapter_by_each_of_its_names": ["lora_path", "model"],
    "test_parameters.py::test_ways_to_say_the_same": ["messages"],
    "test_conformance.py::test_a_prompt_means_the_same_in_every_shape": ["prompt"],
    "test_parameters.py::test_the_last_turn_is_left_open_on_request": [
        *("add_generation_prompt", "continue_final_message"),
    ],
    "test_chat.py::test_the_prompt_is_the_rendered_template": ["chat_template_kwargs"],
    "test_request_reports.py::test_timings_of_a_whole_answer": ["return_timings"],
    "test_request_reports.py::test_user_is_for_the_log": ["user"],
    "test_abort.py::test_names_are_unique_among_live_requests_only": ["rid"],
    "test_abort.py::test_request_id_is_another_word_for_rid": ["request_id"],
    "test_structured_output.py::test_schemas": ["response_format", "json_schema", "guided_json"],
    "test_structured_output.py::test_a_phone_number": ["regex", "guided_regex", "structured_outputs"],
    "test_structured_output.py::test_grammars_and_choices": [
        *("ebnf", "guided_grammar", "choice", "guided_choice"),
    ],
    "test_structured_output.py::test_a_structural_tag": ["structural_tag"],
    "test_tools.py::test_calls_at_every_border_of_chunks": ["tools"],
    "test_tools.py::test_without_a_choice_tools_are_neither_shown_nor_read": ["tool_choice"],
    "test_bundled_tools.py::test_one_call_at_a_time": ["parallel_tool_calls"],
    "test_reasoning.py::test_effort_reaches_the_template": ["reasoning_effort"],
    "test_reasoning.py::test_the_text_can_be_left_whole": ["separate_reasoning"],
    "test_reasoning.py::test_thoughts_can_come_in_one_piece": ["stream_reasoning"],
    "test_reasoning.py::test_the_engine_is_told_of_thoughts_where_it_has_to_know": [
        *("thinking_budget", "thinking_token_budget"),
    ],
}


class Asker:
    """Asks one endpoint of the bundled model."""

    def __init__(self, server: ServerProcess, path: str) -> None:
        self._server, self.path = server, path
        self.is_chat = path == CHAT
        self.end = server.http.post(
            "/tokenize", json={"model": "default", "prompt": "<|im_end|>", "add_special_tokens": False}
        ).json()["tokens"][0]

    def post(self, **fields: Any) -> Any:
        prompt = {"messages": STORY} if self.is_chat else {"prompt": "Once upon a time"}
        body = {"model": "default", "return_token_ids": True, **prompt, **fields}
        response = self._server.http.post(self.path, json=body)
        assert response.status_code == 200, response.text
        assert "x-ignored-params" not in response.headers
        return response

    def __call__(self, **fields: Any) -> dict[str, Any]:
        return self.post(**fields).json()

    def choices(self, **fields: Any) -> list[dict[str, Any]]:
        """What can be compared between requests: all but names and times."""
        choices = self(**fields)["choices"]
        for choice in choices:
            choice["text"] = choice["message"]["content"] if self.is_chat else choice["text"]
        return choices

    def ids(self, **fields: Any) -> list[list[int]]:
        return [choice["token_ids"] for choice in self.choices(**fields)]

    def first_ids(self, **fields: Any) -> Counter[int]:
        """The first token of 128 answers to what leaves it open."""
        prompt = {} if self.is_chat else {"prompt": "The"}
        fields = {"n": 128, "max_tokens": 1, "ignore_eos": True, **prompt, **fields}
        return Counter(ids[0] for ids in self.ids(seed=1, **fields))

    @property
    def scores(self) -> dict[str, Any]:
        """Asks for no more than the log-probability of each token."""
        return {"logprobs": True} if self.is_chat else {"logprobs": 0}

    def top(self, num: int) -> dict[str, Any]:
        return {"logprobs": True, "top_logprobs": num} if self.is_chat else {"logprobs": num}


@dataclasses.dataclass(frozen=True)
class Row:
    """`default` does what leaving out does; `show` fails unless `low` and `high` do what they are for."""

    default: Any
    low: Any
    high: Any
    paths: tuple[str, ...]
    show: Callable[[Asker, Any, Any], None]


def row(name: str, default: Any, low: Any, high: Any, paths: tuple[str, ...] = BOTH) -> Callable[[Any], Any]:
    def add(show: Callable[[Asker, Any, Any], None]) -> Callable[[Asker, Any, Any], None]:
        assert name not in TABLE
        TABLE[name] = Row(default, low, high, paths, show)
        return show

    return add


# --- which token is taken


@row("temperature", 1, 0, 2)
def _(ask: Asker, low: float, high: float) -> None:
    kinds = [len(ask.first_ids(temperature=t)) for t in (low, 1, high)]
    assert kinds[0] == 1 < kinds[1] < kinds[2]


@row("top_p", 1, 1e-300, 1)
def _(ask: Asker, low: float, high: float) -> None:
    assert len(ask.first_ids(top_p=low, temperature=2)) == 1
    assert ask.first_ids(top_p=high) == ask.first_ids()
    assert set(ask.first_ids(top_p=0.5)) < set(ask.first_ids())


@row("top_k", -1, -1, LARGEST)
def _(ask: Asker, low: int, high: int) -> None:
    free = ask.first_ids(temperature=2)
    for off in (low, 0, VOCAB, high):
        assert ask.first_ids(top_k=off, temperature=2) == free
    assert set(ask.first_ids(top_k=1, temperature=2)) == set(ask.first_ids(temperature=0))
    assert len(ask.first_ids(top_k=2, temperature=2)) == 2


@row("min_p", 0, 0, 1)
def _(ask: Asker, low: float, high: float) -> None:
    assert ask.first_ids(min_p=low, temperature=2) == ask.first_ids(temperature=2)
    assert ask.first_ids(min_p=high, temperature=2) == ask.first_ids(temperature=0)


def first_change(ask: Asker, **fields: Any) -> tuple[Counter[int], int, int]:
    """Where a greedy answer first becomes another one: (tokens written before, the token without, with)."""
    free, changed = (ask.ids(temperature=0, max_tokens=300, ignore_eos=True, **f)[0] for f in ({}, fields))
    at = next(i for i, (a, b) in enumerate(zip(free, changed, strict=True)) if a != b)
    return Counter(free[:at]), free[at], changed[at]


@row("frequency_penalty", 0, -2, 2)
def _(ask: Asker, low: float, high: float) -> None:
    """Up to the first change all scores are the same, so it says which token the penalty was for."""
    written, without, rewarded = first_change(ask, frequency_penalty=low)
    assert written[rewarded] > written[without]
    written, without, spared = first_change(ask, frequency_penalty=high)
    assert written[spared] < written[without]


@row("presence_penalty", 0, -2, 2)
def _(ask: Asker, low: float, high: float) -> None:
    written, without, rewarded = first_change(ask, presence_penalty=low)
    assert written[rewarded] > 0 == written[without]
    written, without, spared = first_change(ask, presence_penalty=high)
    assert written[spared] == 0 < written[without]


@row("repetition_penalty", 1, 1e-6, 2)
def _(ask: Asker, low: float, high: float) -> None:
    answer = ask(repetition_penalty=low, max_tokens=30, ignore_eos=True)
    (choice,) = answer["choices"]
    prompt_ids = (answer if ask.is_chat else choice)["prompt_token_ids"]
    assert set(choice["token_ids"]) <= set(prompt_ids), "what was said has nearly all of the probability"
    written, without, _ = first_change(ask, repetition_penalty=high)
    assert without in written or without in prompt_ids


@row("logit_bias", {}, {"0": -100, "4095": -100}, {"4095": 100})
def _(ask: Asker, low: dict[str, int], high: dict[str, int]) -> None:
    assert set(ask.first_ids(logit_bias=high)) == {4095}
    best = next(iter(ask.first_ids(temperature=0)))
    assert best not in ask.first_ids(logit_bias={str(best): -100})
    assert ask.first_ids(logit_bias={str(best): 0}) == ask.first_ids()
    assert ask.first_ids(logit_bias=low)  # both ends of the vocabulary


@row("seed", None, -(2**63), LARGEST)
def _(ask: Asker, low: int, high: int) -> None:
    answers = [ask.ids(seed=seed, max_tokens=30) for seed in (low, -1, 0, 1, high)]
    assert [ask.ids(seed=seed, max_tokens=30) for seed in (low, -1, 0, 1, high)] == answers
    assert len({str(ids) for ids in answers}) == 5
    assert "x-seed" not in ask.post(seed=low).headers
    drawn = [ask.post(max_tokens=30).headers["x-seed"] for _ in range(2)]
    assert drawn[0] != drawn[1]


# --- how long an answer is, and where it ends


def at_the_end(ask: Asker) -> dict[str, Any]:
    """Nothing but the end of the answer can come."""
    return {"logit_bias": {str(ask.end): FORCE}, "temperature": 0}


@row("max_tokens", 16, 0, CONTEXT - 1)
def _(ask: Asker, low: int, high: int) -> None:
    assert len(ask.ids(ignore_eos=True)[0]) == 16
    echo = {} if ask.is_chat else {"echo": True}
    (none,) = ask.choices(max_tokens=low, **echo)
    text = "" if ask.is_chat else "Once upon a time"
    assert (none["text"], none["token_ids"], none["finish_reason"]) == (text, [], "length")
    if not ask.is_chat:  # one token of prompt, and all the rest of the context
        answer = ask(prompt=[300], max_tokens=high, ignore_eos=True)
        assert answer["usage"] == {**answer["usage"], "completion_tokens": high, "total_tokens": CONTEXT}


@row("max_completion_tokens", None, 0, CONTEXT - 1, (CHAT,))
def _(ask: Asker, low: int, high: int) -> None:
    assert ask.ids(max_completion_tokens=low, max_tokens=9) == [[]], "the newer name wins, with 0 too"
    assert len(ask.ids(max_completion_tokens=20, max_tokens=9, ignore_eos=True)[0]) == 20
    messages = [{"role": "user", "content": "x" * 1500}]
    num_prompt = ask(messages=messages, max_tokens=1)["usage"]["prompt_tokens"]
    rest = CONTEXT - num_prompt
    answer = ask(messages=messages, max_completion_tokens=min(high, rest), ignore_eos=True)
    assert answer["usage"]["total_tokens"] == CONTEXT


@row("min_tokens", 0, 0, 40)
def _(ask: Asker, low: int, high: int) -> None:
    """It puts off ends of the model's and tokens that stop; a stop string ends an answer all the same."""
    fields = {**at_the_end(ask), "max_tokens": 40}
    (at_once,) = ask.choices(**fields, min_tokens=low)
    assert (at_once["token_ids"], at_once["finish_reason"]) == ([ask.end], "stop")
    for least in (1, 7, high):
        (put_off,) = ask.choices(**fields, min_tokens=least)
        ids = put_off["token_ids"]
        assert ask.end not in ids[:least]
        assert (len(ids), put_off["finish_reason"]) == (
            (40, "length") if least == 40 else (least + 1, "stop")
        )
    (free,) = ask.choices(temperature=0, max_tokens=40, ignore_eos=True)
    stop = free["token_ids"][3]
    (put_off,) = ask.choices(temperature=0, max_tokens=40, stop_token_ids=[stop], min_tokens=20)
    assert stop not in put_off["token_ids"][:20] and len(put_off["token_ids"]) >= 20
    piece = free["text"][8:12]
    (cut,) = ask.choices(temperature=0, max_tokens=40, stop=piece, min_tokens=40)
    assert (cut["text"], cut["matched_stop"]) == (free["text"][: free["text"].index(piece)], piece)


@row("ignore_eos", False, False, True)
def _(ask: Asker, low: bool, high: bool) -> None:
    fields = {**at_the_end(ask), "max_tokens": 9}
    assert ask.ids(**fields, ignore_eos=low) == [[ask.end]]
    (choice,) = ask.choices(**fields, ignore_eos=high)
    assert (choice["token_ids"], choice["finish_reason"]) == ([ask.end] * 9, "length")
    (stopped,) = ask.choices(**fields, ignore_eos=high, stop_token_ids=[ask.end])
    assert (stopped["token_ids"], stopped["matched_stop"]) == ([ask.end], ask.end), "a stop of the client's"


@row("skip_special_tokens", True, False, True)
def _(ask: Asker, low: bool, high: bool) -> None:
    fields = {**at_the_end(ask), "max_tokens": 3, "ignore_eos": True}
    assert [c["text"] for c in ask.choices(**fields, skip_special_tokens=low)] == ["<|im_end|>" * 3]
    assert [c["text"] for c in ask.choices(**fields, skip_special_tokens=high)] == [""]


@row("stop", [], "e", [*(f"<{i}>" for i in range(31)), "e"])
def _(ask: Asker, low: str, high: list[str]) -> None:
    fields = {"temperature": 0, "max_tokens": 40}
    (free,) = ask.choices(**fields)
    assert "e" in free["text"]
    for stop in (low, [low], high, high[::-1]):
        (choice,) = ask.choices(**fields, stop=stop)
        assert (choice["text"], choice["matched_stop"]) == (free["text"][: free["text"].index("e")], "e")
        assert choice["token_ids"] == free["token_ids"][: len(choice["token_ids"])]
    others = [chr(0x4E00 + i) * 256 for i in range(32)]  # long ones that never come
    assert ask.choices(**fields, stop=others) == [free]


@row("stop_token_ids", [], [], list(range(VOCAB - 1024, VOCAB)))
def _(ask: Asker, low: list[int], high: list[int]) -> None:
    fields = {"temperature": 0, "max_tokens": 30}
    (free,) = ask.choices(**fields)
    last = free["token_ids"][10]
    many = [i for i in high if i not in free["token_ids"]][:1023]
    (choice,) = ask.choices(**fields, stop_token_ids=[*many, last])
    assert choice["token_ids"] == free["token_ids"][: free["token_ids"].index(last) + 1]
    assert (choice["finish_reason"], choice["matched_stop"]) == ("stop", last)
    assert ask.choices(**fields, stop_token_ids=many) == ask.choices(**fields, stop_token_ids=low) == [free]


def keeps_the_stop(name: str) -> Callable[[Asker, bool, bool], None]:
    def show(ask: Asker, low: bool, high: bool) -> None:
        fields = {"temperature": 0, "max_tokens": 40}
        (free,) = ask.choices(**fields)
        end = free["text"].index("e")
        found = [ask.choices(**fields, stop="e", **{name: value})[0]["text"] for value in (low, high)]
        assert found == [free["text"][:end], free["text"][: end + 1]]

    return show


for _name in ("no_stop_trim", "include_stop_str_in_output"):
    row(_name, False, False, True)(keeps_the_stop(_name))


# --- what an answer holds


@row("n", 1, 1, 128)
def _(ask: Asker, low: int, high: int) -> None:
    fields = {"seed": 5, "max_tokens": 6, "ignore_eos": True}
    answer = ask(**fields, n=high)
    choices = answer["choices"]
    assert [choice["index"] for choice in choices] == list(range(128))
    assert len({str(choice["token_ids"]) for choice in choices}) > 16
    assert choices[:1] == ask(**fields, n=low)["choices"]
    assert choices[:9] == ask(**fields, n=9)["choices"], "a choice does not depend on how many there are"
    assert answer["usage"]["completion_tokens"] == 128 * 6
    assert answer["usage"]["prompt_tokens"] == ask(**fields)["usage"]["prompt_tokens"]


@row("logprobs", None, False, True, (CHAT,))
def _(ask: Asker, low: bool, high: bool) -> None:
    (without,) = ask.choices(seed=1, logprobs=low)
    (choice,) = ask.choices(seed=1, logprobs=high)
    content = choice.pop("logprobs")["content"]
    assert {**choice, "logprobs": None} == without
    assert "".join(token["token"] for token in content) == choice["text"]
    assert all(token["logprob"] <= 0 and token["top_logprobs"] == [] for token in content)


@row("top_logprobs", 0, 0, 20, (CHAT,))
def _(ask: Asker, low: int, high: int) -> None:
    tokens = [
        ask.choices(seed=1, logprobs=True, top_logprobs=num)[0]["logprobs"]["content"]
        for num in (low, 1, high)
    ]
    for none, one, most in zip(*tokens, strict=True):
        assert none["logprob"] == one["logprob"] == most["logprob"] <= 0
        assert (none["top_logprobs"], one["top_logprobs"]) == ([], most["top_logprobs"][:1])
        values = [entry["logprob"] for entry in most["top_logprobs"]]
        assert len(values) == 20 and values == sorted(values, reverse=True) and values[0] <= 0
        if most["logprob"] > values[-1]:
            assert most["token"] in {entry["token"] for entry in most["top_logprobs"]}


@row("completion logprobs", None, 0, 20, (COMPLETIONS,))
def _(ask: Asker, low: int, high: int) -> None:
    (least,), (most,) = (ask.choices(seed=1, logprobs=num) for num in (low, high))
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert least["logprobs"][name] == most["logprobs"][name]
    assert "".join(most["logprobs"]["tokens"]) == most["text"] == least["text"]
    own = zip(most["logprobs"]["tokens"], most["logprobs"]["token_logprobs"], strict=True)
    for (token, value), few, many in zip(
        own, least["logprobs"]["top_logprobs"], most["logprobs"]["top_logprobs"], strict=True
    ):
        assert few == {token: value} and many[token] == value <= 0
        assert len(many) in (20, 21)


@row("return_token_ids", False, False, True)
def _(ask: Asker, low: bool, high: bool) -> None:
    for fields in ({}, {"n": 3}):
        plain = ask(seed=1, return_token_ids=low, **fields)
        assert "token_ids" not in str(plain)
        told = ask(seed=1, return_token_ids=high, **fields)
        num = sum(len(choice["token_ids"]) for choice in told["choices"])
        assert told["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"] == num
        prompt_ids = told["prompt_token_ids"] if ask.is_chat else told["choices"][0]["prompt_token_ids"]
        assert len(prompt_ids) == told["usage"]["prompt_tokens"]


@row("return_cached_tokens_details", False, False, True)
def _(ask: Asker, low: bool, high: bool) -> None:
    plain, told = (ask(seed=1, return_cached_tokens_details=value) for value in (low, high))
    assert plain["usage"]["prompt_tokens_details"] is None and "sglext" not in plain
    num = told["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert told["sglext"] == {"cached_tokens_details": {"device": num, "host": 0}}


@row("echo", False, False, True, (COMPLETIONS,))
def _(ask: Asker, low: bool, high: bool) -> None:
    plain, echoed = (ask.choices(seed=1, n=2, echo=value) for value in (low, high))
    assert [c["text"] for c in echoed] == ["Once upon a time" + c["text"] for c in plain]
    assert [c["token_ids"] for c in echoed] == [c["token_ids"] for c in plain], "generated ones only"


@row("best_of", 1, 1, 128, (COMPLETIONS,))
def _(ask: Asker, low: int, high: int) -> None:
    fields = {"seed": 1, "max_tokens": 2}
    assert ask.choices(best_of=low, **fields) == ask.choices(**fields)
    assert ask.choices(best_of=high, n=high, **fields) == ask.choices(n=high, **fields)


@row("stream", False, False, True)
def _(ask: Asker, low: bool, high: bool) -> None:
    (whole,) = ask.choices(seed=1, stream=low)
    response = ask.post(seed=1, stream=high)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    parts = [event["choices"][0] for event in events_of(response)]
    said = [(part["delta"].get("content") or "") if ask.is_chat else part["text"] for part in parts]
    assert ("".join(said), parts[-1]["finish_reason"]) == (whole["text"], whole["finish_reason"])
    assert len([text for text in said if text]) > 5


@row(
    "stream_options",
    {},
    {"include_usage": False, "continuous_usage_stats": False, "await_first_token": False},
    {"include_usage": True, "continuous_usage_stats": True, "await_first_token": True},
)
def _(ask: Asker, low: dict[str, bool], high: dict[str, bool]) -> None:
    def events(options: dict[str, bool]) -> list[dict[str, Any]]:
        return events_of(ask.post(seed=1, stream=True, stream_options=options))

    assert not any("usage" in event for event in events(low))
    *with_choice, last = events({**low, "include_usage": True})
    assert {event["usage"] for event in with_choice} == {None} and last["choices"] == []
    assert last["usage"] == {**ask(seed=1)["usage"]}
    *counted, last = events(high)
    counts = [event["usage"]["completion_tokens"] for event in counted if event["usage"]]
    assert counts == sorted(counts) and counts[-1] == last["usage"]["completion_tokens"]
    assert all(event["choices"] for event in counted)


@row("stream_interval", None, 1, 1024)
def _(ask: Asker, low: int, high: int) -> None:
    def num_texts(**fields: Any) -> int:
        response = ask.post(seed=1, stream=True, max_tokens=30, ignore_eos=True, **fields)
        parts = [event["choices"][0] for event in events_of(response)]
        return len([p for p in parts if (p["delta"].get("content") if ask.is_chat else p["text"])])

    assert num_texts(stream_interval=low) == num_texts() > 20
    assert num_texts(stream_interval=high) == 2, "the first token, and all others"


@row("truncate_prompt_tokens", None, -1, 2**31 - 1)
def _(ask: Asker, low: int, high: int) -> None:
    whole = ask(seed=1)
    for all_of_it in (low, high):
        answer = ask(seed=1, truncate_prompt_tokens=all_of_it)
        assert (answer["choices"], answer["truncated_prompt_tokens"]) == (whole["choices"], 0)
    cut = ask(seed=1, truncate_prompt_tokens=1)
    num = whole["usage"]["prompt_tokens"]
    assert (cut["usage"]["prompt_tokens"], cut["truncated_prompt_tokens"]) == (1, num - 1)
    assert "truncated_prompt_tokens" not in whole


def separates(name: str) -> Callable[[Asker, str, str], None]:
    def show(ask: Asker, low: str, high: str) -> None:
        long = f"{name} {ask.path} " + "One of many prompts of its own. " * 8
        prompt = {"messages": [{"role": "user", "content": long}]} if ask.is_chat else {"prompt": long}

        def cached(**fields: Any) -> int:
            usage = ask(max_tokens=1, return_cached_tokens_details=True, **prompt, **fields)["usage"]
            return usage["prompt_tokens_details"]["cached_tokens"]

        first = cached()
        assert cached() > first + 16, "without a salt, and with an empty one, all share"
        assert cached(**{name: low}) == cached()
        assert cached(**{name: high}) == 0 < cached(**{name: high})
        assert cached(**{name: high[:-1]}) == 0

    return show


for _name in ("cache_salt", "extra_key"):
    row(_name, None, "", "x" * 256)(separates(_name))


@row("priority", 0, -(2**31 - 1), 2**31 - 1)
def _(ask: Asker, low: int, high: int) -> None:
    """Who goes first is shown by test_scheduling_fields.py and tests/unit/test_waiting_queue.py."""
    free = ask.choices(seed=1)
    assert ask.choices(seed=1, priority=low) == ask.choices(seed=1, priority=high) == free


# --- the table


@pytest.fixture
def ask(request: pytest.FixtureRequest, bundled: ServerProcess) -> Asker:
    return Asker(bundled, request.param)


def cases() -> list[Any]:
    return [
        pytest.param(path, name, id=f"{name} {path}") for name, row in TABLE.items() for path in row.paths
    ]


@pytest.mark.parametrize(("ask", "name"), cases(), indirect=["ask"])
def test_the_ends_of_its_range_do_what_they_are_for(ask: Asker, name: str) -> None:
    TABLE[name].show(ask, TABLE[name].low, TABLE[name].high)


@pytest.mark.parametrize(("ask", "name"), cases(), indirect=["ask"])
def test_its_default_is_what_happens_without_it(ask: Asker, name: str) -> None:
    field, row = name.split()[-1], TABLE[name]
    others = {"logprobs": True} if field == "top_logprobs" else {}
    # Where the default is no value of its own, null stands for it.
    left_out = ask(seed=2, stop=["~~"], **others) if field not in ("seed", "stop") else ask(seed=2, **others)
    given = {"seed": 2, "stop": ["~~"], **others}
    if field == "stop":
        given.pop("stop")
    if field == "seed":
        return  # shown by its row: without one, no two answers are alike
    given[field] = row.default
    if field == "return_token_ids":
        left_out, told = ask(**{**given, field: None}), ask(**given)
        assert told["choices"] == left_out["choices"]
        return
    answer = ask(**given)
    assert answer["choices"] == left_out["choices"] and answer["usage"] == left_out["usage"]


def test_the_table_is_complete() -> None:
    described = {*SCHEMAS["ChatRequest"]["properties"], *SCHEMAS["CompletionRequest"]["properties"]}
    elsewhere = [name for names in ELSEWHERE.values() for name in names]
    assert {*(name.split()[-1] for name in TABLE), *elsewhere} == described
    assert len(elsewhere) == len(set(elsewhere)) and not {*elsewhere} & {*TABLE}
    for place in ELSEWHERE:
        file, test = place.split("::")
        assert re.search(rf"^def {test}\(", (Path(__file__).parent / file).read_text(), re.MULTILINE), place


def test_the_ends_of_the_table_are_those_of_the_description() -> None:
    for name, row in TABLE.items():
        request = SCHEMAS["ChatRequest" if row.paths[0] == CHAT else "CompletionRequest"]
        wanted = request["properties"][name.split()[-1]]["anyOf"][0]
        if "minimum" in wanted and name not in ("top_k", "truncate_prompt_tokens"):
            assert row.low == wanted["minimum"], name
        if "exclusiveMinimum" in wanted:
            assert wanted["exclusiveMinimum"] < row.low < 1e-5, name
        if "maximum" in wanted and wanted["maximum"] != LARGEST:
            assert row.high == wanted["maximum"], name
        if "maxLength" in wanted:
            assert len(row.high) == wanted["maxLength"], name
        most = next((o["maxItems"] for o in (wanted, *wanted.get("anyOf", ())) if "maxItems" in o), None)
        if most is not None:
            assert len(row.high) == most, name
