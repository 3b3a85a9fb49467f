"""Fields that say how long an answer is and where it ends, at their defaults and at both ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from helpers.effects import CHAT, CONTEXT, VOCAB, Asker, Table

TABLE = Table()
FORCE = 100


def at_the_end(ask: Asker) -> dict[str, Any]:
    """Nothing but the end of the answer can come."""
    return {"logit_bias": {str(ask.end): FORCE}, "temperature": 0}


@TABLE.row("max_tokens", 16, 0, CONTEXT - 1)
def _(ask: Asker, low: int, high: int) -> None:
    assert len(ask.ids(ignore_eos=True)[0]) == 16
    echo = {} if ask.is_chat else {"echo": True}
    (none,) = ask.choices(max_tokens=low, **echo)
    text = "" if ask.is_chat else "Once upon a time"
    assert (none["text"], none["token_ids"], none["finish_reason"]) == (text, [], "length")
    if not ask.is_chat:  # one token of prompt, and all the rest of the context
        answer = ask(prompt=[300], max_tokens=high, ignore_eos=True)
        assert answer["usage"] == {**answer["usage"], "completion_tokens": high, "total_tokens": CONTEXT}


@TABLE.row("max_completion_tokens", None, 0, CONTEXT - 1, (CHAT,))
def _(ask: Asker, low: int, high: int) -> None:
    assert ask.ids(max_completion_tokens=low, max_tokens=9) == [[]], "the newer name wins, with 0 too"
    assert len(ask.ids(max_completion_tokens=20, max_tokens=9, ignore_eos=True)[0]) == 20
    messages = [{"role": "user", "content": "x" * 1500}]
    num_prompt = ask(messages=messages, max_tokens=1)["usage"]["prompt_tokens"]
    rest = CONTEXT - num_prompt
    answer = ask(messages=messages, max_completion_tokens=min(high, rest), ignore_eos=True)
    assert answer["usage"]["total_tokens"] == CONTEXT


@TABLE.row("min_tokens", 0, 0, 40)
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


@TABLE.row("ignore_eos", False, False, True)
def _(ask: Asker, low: bool, high: bool) -> None:
    fields = {**at_the_end(ask), "max_tokens": 9}
    assert ask.ids(**fields, ignore_eos=low) == [[ask.end]]
    (choice,) = ask.choices(**fields, ignore_eos=high)
    assert (choice["token_ids"], choice["finish_reason"]) == ([ask.end] * 9, "length")
    (stopped,) = ask.choices(**fields, ignore_eos=high, stop_token_ids=[ask.end])
    assert (stopped["token_ids"], stopped["matched_stop"]) == ([ask.end], ask.end), "a stop of the client's"


@TABLE.row("skip_special_tokens", True, False, True)
def _(ask: Asker, low: bool, high: bool) -> None:
    fields = {**at_the_end(ask), "max_tokens": 3, "ignore_eos": True}
    assert [c["text"] for c in ask.choices(**fields, skip_special_tokens=low)] == ["<|im_end|>" * 3]
    assert [c["text"] for c in ask.choices(**fields, skip_special_tokens=high)] == [""]


@TABLE.row("stop", [], "e", [*(f"<{i}>" for i in range(31)), "e"])
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


@TABLE.row("stop_token_ids", [], [], list(range(VOCAB - 1024, VOCAB)))
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
    TABLE.row(_name, False, False, True)(keeps_the_stop(_name))


@TABLE.cases()
def test_the_ends_of_its_range_do_what_they_are_for(ask: Asker, name: str) -> None:
    TABLE.check_ends(ask, name)


@TABLE.cases()
def test_its_default_is_what_happens_without_it(ask: Asker, name: str) -> None:
    TABLE.check_default(ask, name)
