"""Calls in free text: from where its reader finds one, a call is held to its tool."""

from __future__ import annotations

import json
import re

import pytest

from engine.grammar.compiler import CompiledGrammar
from engine.grammar.errors import GrammarError
from engine.sampling.constraint import Constraint
from engine.server.tool_constraint import tool_constraint
from engine.server.tools import Function, ToolUse
from engine.text.formats.deepseek import DEEPSEEK_V3, DEEPSEEK_V31
from engine.text.formats.hermes import HERMES
from engine.text.formats.llama3 import LLAMA3
from engine.text.formats.mistral import MISTRAL, MISTRAL_LIST
from engine.text.formats.output import OutputFormat
from engine.text.formats.pythonic import PYTHONIC
from engine.text.formats.thinking import QWEN3
from engine.text.formats.tool_format import NAME, ToolFormat
from helpers.grammars import Grammars, bundled_vocabulary
from helpers.outputs import Found, read

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(bundled_vocabulary())


def use_of_f() -> ToolUse:
    function = Function(name="f", description=None, parameters=SCHEMA, is_strict=True)
    return ToolUse(offered=(function,), callable=(function,), is_required=False, is_parallel=True)


def free_text(grammars: Grammars, tools: ToolFormat) -> CompiledGrammar:
    constraint = tool_constraint(tools, use_of_f(), None)
    return grammars.compile(constraint.kind, constraint.text)


def calls_in(text: str, tools: ToolFormat) -> list[tuple[str, str]]:
    return read(OutputFormat(tools=tools, tool_names=["f"]), [text]).calls


def answer(tools: ToolFormat, value: str) -> str:
    arguments = f"a={value}" if tools.has_python_arguments else f'{{"a": {value}}}'
    begin = tools.begin.replace(NAME, "f")
    return f"Well.{tools.before}{begin}{arguments}{tools.end}{tools.after}"


@pytest.mark.parametrize(
    "tools",
    [HERMES, LLAMA3, MISTRAL, MISTRAL_LIST, PYTHONIC, DEEPSEEK_V3, DEEPSEEK_V31],
    ids=lambda tools: tools.name,
)
def test_arguments_of_a_call_that_has_begun(grammars: Grammars, tools: ToolFormat) -> None:
    grammar = free_text(grammars, tools)
    assert grammars.accepts(grammar, "Well, 1 < 2.")
    assert grammars.accepts(grammar, answer(tools, "1"))
    assert calls_in(answer(tools, "1"), tools) == [("f", '{"a": 1}')]
    assert not grammars.accepts(grammar, answer(tools, '"x"'))


@pytest.mark.parametrize(
    ("tools", "text"),
    [
        (MISTRAL_LIST, '[TOOL_CALLS]  [{"name": "f", "arguments": {"a": "x"}}]'),
        (MISTRAL_LIST, '[TOOL_CALLS]f[ARGS]{"a": "x"}'),
        (DEEPSEEK_V31, '<｜tool▁calls▁begin｜> <｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": "x"}'),
        (LLAMA3, '<|python_tag|> {"name": "f", "parameters": {"a": "x"}}'),
        (LLAMA3, '{"type": "function", "name": "f", "parameters": {"a": "x"}}'),
        (PYTHONIC, '<|python_start|> [f(a="x")]'),
    ],
)
def test_calls_that_are_written_in_another_way(grammars: Grammars, tools: ToolFormat, text: str) -> None:
    """They would be found, so they must not be written."""
    (_, arguments), *_ = calls_in(text, tools)
    assert json.loads(arguments) == {"a": "x"}
    assert not grammars.accepts(free_text(grammars, tools), text)


@pytest.mark.parametrize(
    ("tools", "text"),
    [
        (LLAMA3, '{"parameters": {"a": "x"}, "name": "f"}'),
        (LLAMA3, '{ "name": "f", "parameters": {"a": "x"}}'),
        (LLAMA3, '{"name": "f", "arguments": {"a": "x"}}'),
        (LLAMA3, '{"name":"f","parameters":{"a":"x"}}'),
        (PYTHONIC, 'So, f(a="x")'),
        (PYTHONIC, '[ f(a="x")]'),
        (PYTHONIC, '[f(a=1)],f(a="x")]'),
    ],
)
def test_what_is_written_as_no_format_begins_calls_is_content(
    grammars: Grammars, tools: ToolFormat, text: str
) -> None:
    assert grammars.accepts(free_text(grammars, tools), text)
    assert ("f", '{"a": "x"}') not in calls_in(text, tools)


def test_thoughts_that_are_marked_in_letters_are_free(grammars: Grammars) -> None:
    """They end at the first tag, and what a call in them would hold beyond is none of its own."""
    constraint = tool_constraint(PYTHONIC, use_of_f(), None, QWEN3, has_written_tags=True)
    grammar = grammars.compile(constraint.kind, constraint.text)
    for text in ("Hm. [f(a=1)]", "<think>[f(a='x')]</think>[f(a=1)]", "<think></think>Well."):
        assert grammars.accepts(grammar, text)
    for text in ("<think>[f(a=1)]</think>[f(a='x')]", "Hm. <think>", "\n<think>Hm.</think>[f(a=1)]"):
        assert not grammars.accepts(grammar, text)


def test_further_calls_of_pythonic_are_held(grammars: Grammars) -> None:
    grammar = free_text(grammars, PYTHONIC)
    assert grammars.accepts(grammar, "See [f(a=1), f(a=2)].")
    for text in ('[f(a=1),f(a="x")]', '[f(a=1), f(a="x")]', "[f(a=1) and", "[f(a=1)"):
        assert not grammars.accepts(grammar, text)


def test_many_tools_in_many_ways(grammars: Grammars) -> None:
    """A list of calls to 128 tools, each of which may come first, is no constraint of their square."""
    functions = tuple(
        Function(name=f"tool_{i}", description=None, parameters=SCHEMA, is_strict=True) for i in range(128)
    )
    use = ToolUse(offered=functions, callable=functions, is_required=False, is_parallel=True)
    constraint = tool_constraint(PYTHONIC, use, None)
    assert len(constraint.text) < 200_000
    grammar = grammars.compile(constraint.kind, constraint.text)
    assert grammars.accepts(grammar, "[tool_3(a=1), tool_127(a=2)]")
    assert not grammars.accepts(grammar, "[tool_3(a=1), tool_128(a=2)]")


@pytest.mark.parametrize(
    ("tools", "answer", "begins"),
    [
        (HERMES, Constraint("regex", "[^y]*z"), "<tool_call>"),
        (LLAMA3, Constraint("regex", r'\{"name": .*'), '{"name": "f", "parameters": '),
        (PYTHONIC, Constraint("choice", '["yes", "[f(a=2, "]'), "[f("),
        (PYTHONIC, Constraint("ebnf", 'root ::= "<think>" [a-z]*'), "<think>"),
    ],
)
def test_an_answer_that_could_be_taken_for_calls_is_refused(
    grammars: Grammars, tools: ToolFormat, answer: Constraint, begins: str
) -> None:
    """Nothing would hold what is read as a call then."""
    constraint = tool_constraint(tools, use_of_f(), answer, QWEN3)
    with pytest.raises(
        GrammarError, match=f"cannot be told from an answer that begins with '{re.escape(begins)}"
    ):
        grammars.compile(constraint.kind, constraint.text)


def test_calls_in_an_answer_with_a_constraint_are_none(grammars: Grammars) -> None:
    schema = {"type": "object", "properties": {"s": {"type": "string"}}}
    constraint = tool_constraint(PYTHONIC, use_of_f(), Constraint("json_schema", json.dumps(schema)))
    text = """{"s":"[f(a='x')]"}"""
    assert grammars.accepts(grammars.compile(constraint.kind, constraint.text), text)
    either = OutputFormat(tools=PYTHONIC, tool_names=["f"], is_calls_or_answer=True)
    assert read(either, [text]) == Found(text)
    assert read(either, list("[f(a=1)]")).calls == [("f", '{"a": 1}')]
