"""Tool calls and thoughts in the text of an output, however it is cut."""

from __future__ import annotations

import itertools
import json

import pytest

from engine.config.server_config import REASONING_PARSERS, TOOL_CALL_PARSERS
from engine.text.formats.events import CallArguments, CallRejected, CallStart, Content
from engine.text.formats.known import THOUGHT_FORMATS, TOOL_FORMATS
from engine.text.formats.output import OutputParser
from engine.text.formats.reader import Stage, overlap
from helpers.outputs import RIGHT, TOOLS, WRONG, Found, fold, format_named, read

DEEPSEEK = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>"


def in_every_cut(text: str):
    """The text whole, as characters, in every two pieces, and in pieces of each size."""
    yield [text]
    yield list(text)
    for at in range(1, len(text)):
        yield [text[:at], text[at:]]
    for size in range(2, 20):
        yield [text[i : i + size] for i in range(0, len(text), size)]


@pytest.mark.parametrize(("name", "text", "meaning"), RIGHT)
def test_calls_are_found_at_every_cut(name, text, meaning):
    for pieces in in_every_cut(text):
        assert read(format_named(name), pieces) == meaning
    for _, arguments in meaning.calls:
        assert isinstance(json.loads(arguments), dict)


@pytest.mark.parametrize(("name", "text"), WRONG)
def test_what_is_no_call_comes_back_as_content(name, text):
    for pieces in in_every_cut(text):
        assert read(format_named(name), pieces) == Found(text)


@pytest.mark.parametrize(("name", "text", "meaning"), RIGHT)
def test_a_call_that_is_broken_off_is_content_and_earlier_ones_stay(name, text, meaning):
    for at in range(len(text)):
        found = read(format_named(name), [text[:at]])
        assert found.calls == meaning.calls[: len(found.calls)]
        if not found.calls:
            assert found.content.strip() == text[:at].strip() or name == "gpt-oss"


@pytest.mark.parametrize(("name", "text", "meaning"), RIGHT)
def test_a_call_that_a_limit_cuts_off_keeps_what_it_has(name, text, meaning):
    for at in range(len(text)):
        found = read(format_named(name), [text[:at]], is_cut=True)
        for (called, arguments), (wanted, whole) in zip(found.calls, meaning.calls, strict=False):
            assert called == wanted and whole.startswith(arguments)
        if found.calls:
            begun = overlap(found.content, TOOL_FORMATS[name].markers)  # of another one, perhaps
            said = found.content[: len(found.content) - begun].rstrip()
            assert meaning.content.startswith(said)


@pytest.mark.parametrize(
    ("name", "text", "arguments"),
    [
        ("hermes", '<tool_call>\n{"name": "add"', ""),
        ("hermes", '<tool_call>\n{"name": "add", "argum', ""),
        ("llama3", '{"name": "add", "parameters": ', ""),
        ("mistral", "[TOOL_CALLS]add[ARGS]", ""),
        ("mistral", '[TOOL_CALLS][{"name": "add", "arguments": ', ""),
        ("pythonic", "[add(", "{"),
        ("pythonic", '[add(a=1, b="x", c', '{"a": 1, "b": "x"'),
        ("pythonic", "[add(a=12", '{"a": '),
        ("pythonic", "[add(a=[1, 2.", '{"a": [1'),
        ("pythonic", 'So: <|python_start|>[add(a={"b": [1]}, t="un', '{"a": {"b": [1]}, "t": '),
        ("deepseekv3", f"{DEEPSEEK}function<｜tool▁sep｜>add\n``", ""),
        ("deepseekv31", f"{DEEPSEEK}add<｜tool▁sep｜>", ""),
        ("gpt-oss", "<|channel|>commentary to=functions.add <|constrain|>json<|message|>", ""),
    ],
)
def test_a_call_that_a_limit_cuts_off_has_its_name_and_what_is_certain(name, text, arguments):
    for pieces in in_every_cut(text):
        found = read(format_named(name), pieces, is_cut=True)
        assert found == Found(
            text[: text.find("<|p")].strip() if text[0] == "S" else "", calls=[("add", arguments)]
        )
        stopped = read(format_named(name), pieces)
        assert not stopped.calls and (stopped.content == text or name == "gpt-oss")


def test_arguments_are_given_out_as_they_come():
    parser = OutputParser(format_named("hermes"))
    parser.push('<tool_call>{"name": "add", "arguments": {')
    for piece in ('"a"', ': "some ', "long ", 'text"'):
        assert parser.push(piece) == [CallArguments(0, piece)]


def test_text_is_held_back_only_where_a_marker_may_begin():
    parser = OutputParser(format_named("hermes"))
    assert parser.push("a <") == [Content("a")]
    assert parser.push("tool") == []
    assert parser.push("box") == [Content(" <toolbox")]


def test_an_answer_in_json_is_not_held_up():
    parser = OutputParser(format_named("llama3"))
    assert parser.push('{"na') == []
    assert fold(parser.push('me": "Bob", ')) == Found('{"name": "Bob",')


def test_a_call_that_turns_out_wrong_is_taken_back():
    parser = OutputParser(format_named("hermes"))
    text = '<tool_call>{"name": "add", "arguments": {"a": ]'
    events = parser.push(text)
    assert [type(event) for event in events[:3]] == [CallStart, CallArguments, CallRejected]
    assert fold(events) == Found(text)
    right = parser.push(' no <tool_call>{"name": "add", "arguments": {}}</tool_call>')
    assert [getattr(event, "index", None) for event in right] == [None, 1, 1, 1]


def test_a_header_that_is_too_long_is_none_at_any_cut():
    text = "<|channel|>" + "x" * 600 + "<|message|>hi"
    for pieces in in_every_cut(text):
        assert read(format_named("gpt-oss", "gpt-oss"), pieces) == Found(text)


def test_white_space_around_plain_content_is_kept():
    for text in (" \n a b \n", "\n", " "):
        for pieces in in_every_cut(text):
            assert read(format_named("hermes"), pieces) == Found(text)


# --- thoughts

THOUGHTS = "\nFirst <b>, then\n\nc.\n"
ANSWER = "The answer </think> is 4."


@pytest.mark.parametrize(
    ("thoughts", "tools", "is_open", "text"),
    [
        ("qwen3", None, False, f"<think>{THOUGHTS}</think>\n\n{ANSWER}"),
        ("qwen3", None, False, f"\n<think>{THOUGHTS}</think>{ANSWER}"),
        ("qwen3", None, True, f"{THOUGHTS}</think>\n\n{ANSWER}"),
        ("qwen3", "hermes", True, f"{THOUGHTS}</think>\n\n{ANSWER}"),
        ("deepseek-r1", None, True, f"<think>{THOUGHTS}</think>{ANSWER}"),
        ("mistral", "mistral", False, f"[THINK]{THOUGHTS}[/THINK]{ANSWER}"),
        (
            "gpt-oss",
            None,
            False,
            f"<|channel|>analysis<|message|>{THOUGHTS}<|end|><|start|>assistant<|channel|>final<|message|>{ANSWER}",
        ),
    ],
)
def test_thoughts_are_parted_from_the_answer(thoughts, tools, is_open, text):
    output_format = format_named(tools, thoughts, starts_thinking=is_open)
    for pieces in in_every_cut(text):
        assert read(output_format, pieces) == Found(ANSWER, THOUGHTS.strip())
    whole = format_named(tools, thoughts, starts_thinking=is_open, separates_thoughts=False)
    for pieces in in_every_cut(text):
        found = read(whole, pieces)
        assert not found.reasoning
        assert found.content == text.replace("<|start|>assistant<|channel|>final<|message|>", "")


@pytest.mark.parametrize("text", ["No thoughts.", " <thin air", "", "<b>think</b>"])
def test_an_answer_without_thoughts(text):
    for pieces in in_every_cut(text):
        assert read(format_named("hermes", "qwen3"), pieces) == Found(text)


def test_thoughts_that_do_not_end():
    for pieces in in_every_cut("<think>\nWell, </thin"):
        assert read(format_named(None, "qwen3"), pieces) == Found("", "Well, </thin")


def test_calls_behind_thoughts():
    call = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    text = f"<think>\nNot {call} yet.\n</think>\n\n{call}"
    for pieces in in_every_cut(text):
        found = read(format_named("hermes", "qwen3"), pieces)
        assert found == Found("", f"Not {call} yet.", [("add", "{}")])
    harmony = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.add "
        '<|constrain|>json<|message|>{"a": 1}<|call|>'
    )
    for pieces in in_every_cut(harmony):
        assert read(format_named("gpt-oss", "gpt-oss"), pieces) == Found("", "Hm.", [("add", '{"a": 1}')])


def test_the_stage_tells_where_thoughts_end():
    parser = OutputParser(format_named(None, "qwen3"))
    stages = []
    for char in "<think>ab</think>c":
        parser.push(char)
        stages.append(parser.stage)
    assert [(stage, len(list(run))) for stage, run in itertools.groupby(stages)] == [
        (Stage.UNDECIDED, 6),
        (Stage.THINKING, 10),
        (Stage.ANSWERING, 2),
    ]


@pytest.mark.parametrize(
    ("name", "prompt", "is_open"),
    [
        ("qwen3", "<|im_start|>assistant\n<think>\n", True),
        ("qwen3", "<|im_start|>assistant\n", False),
        ("qwen3", "<think>\n\n</think>\n\n", False),
        ("deepseek-r1", "<｜Assistant｜>", True),
        ("deepseek-r1", "<｜Assistant｜></think>", False),
        ("mistral", "[/INST]", False),
        ("gpt-oss", "<|start|>assistant", False),
    ],
)
def test_the_prompt_tells_whether_thoughts_have_begun(name, prompt, is_open):
    assert THOUGHT_FORMATS[name].is_opened_by(prompt) == is_open


# --- limits


@pytest.mark.parametrize("name", sorted(TOOL_FORMATS))
def test_deep_and_long_arguments_do_no_harm(name):
    begin = TOOL_FORMATS[name].before + TOOL_FORMATS[name].begin.replace("NAME", "add")
    for middle in (
        "[" * 100_000,
        '{"a":' * 20_000,
        "(" * 20_000,
        "a=" + "-" * 20_000,
        '"' * 20_001,
        "\\" * 20_001,
    ):
        text = begin + middle
        assert read(format_named(name), [text[i : i + 5] for i in range(0, len(text), 5)]).content


def test_every_name_of_a_flag_is_a_format():
    assert set(TOOL_CALL_PARSERS) == {"auto", "none", *TOOL_FORMATS}
    assert set(REASONING_PARSERS) == {"auto", "none", *THOUGHT_FORMATS}
    assert {tool.name for tool in TOOL_FORMATS.values()} == set(TOOL_FORMATS) - {"qwen25"}
    assert TOOLS
