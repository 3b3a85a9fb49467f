"""Fields that say what an answer holds and how it comes, at their defaults and at both ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from helpers.effects import CHAT, COMPLETIONS, Asker, Table
from helpers.http_server import events_of

TABLE = Table()


@TABLE.row("n", 1, 1, 128)
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


@TABLE.row("logprobs", None, False, True, (CHAT,))
def _(ask: Asker, low: bool, high: bool) -> None:
    (without,) = ask.choices(seed=1, logprobs=low)
    (choice,) = ask.choices(seed=1, logprobs=high)
    content = choice.pop("logprobs")["content"]
    assert {**choice, "logprobs": None} == without
    assert "".join(token["token"] for token in content) == choice["text"]
    assert all(token["logprob"] <= 0 and token["top_logprobs"] == [] for token in content)


@TABLE.row("top_logprobs", 0, 0, 20, (CHAT,))
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


@TABLE.row("completion logprobs", None, 0, 20, (COMPLETIONS,))
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


@TABLE.row("return_token_ids", False, False, True)
def _(ask: Asker, low: bool, high: bool) -> None:
    for fields in ({}, {"n": 3}):
        plain = ask(seed=1, return_token_ids=low, **fields)
        assert "token_ids" not in str(plain)
        told = ask(seed=1, return_token_ids=high, **fields)
        num = sum(len(choice["token_ids"]) for choice in told["choices"])
        assert told["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"] == num
        prompt_ids = told["prompt_token_ids"] if ask.is_chat else told["choices"][0]["prompt_token_ids"]
        assert len(prompt_ids) == told["usage"]["prompt_tokens"]


@TABLE.row("return_cached_tokens_details", False, False, True)
def _(ask: Asker, low: bool, high: bool) -> None:
    plain, told = (ask(seed=1, return_cached_tokens_details=value) for value in (low, high))
    assert plain["usage"]["prompt_tokens_details"] is None and "sglext" not in plain
    num = told["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert told["sglext"] == {"cached_tokens_details": {"device": num, "host": 0}}


@TABLE.row("echo", False, False, True, (COMPLETIONS,))
def _(ask: Asker, low: bool, high: bool) -> None:
    plain, echoed = (ask.choices(seed=1, n=2, echo=value) for value in (low, high))
    assert [c["text"] for c in echoed] == ["Once upon a time" + c["text"] for c in plain]
    assert [c["token_ids"] for c in echoed] == [c["token_ids"] for c in plain], "generated ones only"


@TABLE.row("best_of", 1, 1, 128, (COMPLETIONS,))
def _(ask: Asker, low: int, high: int) -> None:
    fields = {"seed": 1, "max_tokens": 2}
    assert ask.choices(best_of=low, **fields) == ask.choices(**fields)
    assert ask.choices(best_of=high, n=high, **fields) == ask.choices(n=high, **fields)


@TABLE.row("stream", False, False, True)
def _(ask: Asker, low: bool, high: bool) -> None:
    (whole,) = ask.choices(seed=1, stream=low)
    response = ask.post(seed=1, stream=high)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    parts = [event["choices"][0] for event in events_of(response)]
    said = [(part["delta"].get("content") or "") if ask.is_chat else part["text"] for part in parts]
    assert ("".join(said), parts[-1]["finish_reason"]) == (whole["text"], whole["finish_reason"])
    assert len([text for text in said if text]) > 5


@TABLE.row(
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


@TABLE.row("stream_interval", None, 1, 1024)
def _(ask: Asker, low: int, high: int) -> None:
    def num_texts(**fields: Any) -> int:
        response = ask.post(seed=1, stream=True, max_tokens=30, ignore_eos=True, **fields)
        parts = [event["choices"][0] for event in events_of(response)]
        return len([p for p in parts if (p["delta"].get("content") if ask.is_chat else p["text"])])

    assert num_texts(stream_interval=low) == num_texts() > 20
    assert num_texts(stream_interval=high) == 2, "the first token, and all others"


@TABLE.row("truncate_prompt_tokens", None, -1, 2**31 - 1)
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
    TABLE.row(_name, None, "", "x" * 256)(separates(_name))


@TABLE.row("priority", 0, -(2**31 - 1), 2**31 - 1)
def _(ask: Asker, low: int, high: int) -> None:
    """Who goes first is shown by test_scheduling_fields.py and tests/unit/test_waiting_queue.py."""
    free = ask.choices(seed=1)
    assert ask.choices(seed=1, priority=low) == ask.choices(seed=1, priority=high) == free


@TABLE.cases()
def test_the_ends_of_its_range_do_what_they_are_for(ask: Asker, name: str) -> None:
    TABLE.check_ends(ask, name)


@TABLE.cases()
def test_its_default_is_what_happens_without_it(ask: Asker, name: str) -> None:
    TABLE.check_default(ask, name)
