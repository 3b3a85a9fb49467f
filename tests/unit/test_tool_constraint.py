"""Calls in free text: from where its reader finds one, a call is held to its tool."""

from __future__ import annotations

import pytest

from engine.grammar.compiler import CompiledGrammar
from engine.server.tool_constraint import tool_constraint
from engine.server.tools import Function, ToolUse
from engine.text.formats.deepseek import DEEPSEEK_V3, DEEPSEEK_V31
from engine.text.formats.hermes import HERMES
from engine.text.formats.llama3 import LLAMA3
from engine.text.formats.mistral import MISTRAL, MISTRAL_LIST
from engine.text.formats.output import OutputFormat
from engine.text.formats.pythonic import PYTHONIC
from engine.text.formats.tool_format import NAME, ToolFormat
from helpers.grammars import Grammars, bundled_vocabulary
from helpers.outputs import read

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(bundled_vocabulary())


def free_text(grammars: Grammars, tools: ToolFormat) -> CompiledGrammar:
    function = Function(name="f", description=None, parameters=SCHEMA, is_strict=True)
    use = ToolUse(offered=(function,), callable=(function,), is_required=False, is_parallel=True)
    constraint = tool_constraint(tools, use, None)
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
        (DEEPSEEK_V31, '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": "x"}<｜tool▁call▁end｜>'),
    ],
)
def test_calls_that_are_written_in_another_way(grammars: Grammars, tools: ToolFormat, text: str) -> None:
    """They would be found, so they must not be written."""
    assert calls_in(text, tools) == [("f", '{"a": "x"}')]
    assert not grammars.accepts(free_text(grammars, tools), text)
