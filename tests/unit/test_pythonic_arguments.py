"""Arguments that are written as Python's: each is held to what the schema of the tool says of it."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import InvalidRequest
from engine.grammar.compiler import CompiledGrammar
from engine.server.tool_constraint import tool_constraint
from engine.server.tools import Function, ToolUse
from engine.text.formats.pythonic import PYTHONIC
from helpers.grammars import Grammars, bundled_vocabulary

INTEGER = {"type": "integer"}
TREE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/tree"}}}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(bundled_vocabulary())


def calls_of(grammars: Grammars, schema: dict[str, Any], is_strict: bool) -> CompiledGrammar:
    function = Function(name="f", description=None, parameters=schema, is_strict=is_strict)
    use = ToolUse(offered=(function,), callable=(function,), is_required=True, is_parallel=False)
    constraint = tool_constraint(PYTHONIC, use, None)
    return grammars.compile(constraint.kind, constraint.text)


@pytest.mark.parametrize("ref", ["#", "#/properties/a", "#/properties/b/properties/c"])
def test_a_reference_out_of_an_argument(grammars: Grammars, ref: str) -> None:
    """Each argument is a schema of its own, in which `#` would be another one."""
    inner = {"type": "object", "properties": {"c": INTEGER, "d": {"$ref": ref}}}
    schema = {"type": "object", "properties": {"a": INTEGER, "b": inner}}
    with pytest.raises(InvalidRequest, match=r'of f has "\$ref" at #/properties/b/properties/d'):
        calls_of(grammars, schema, is_strict=True)
    loose = calls_of(grammars, schema, is_strict=False)
    for call in ("[f()]", '[f(a="x", b={"d": 1})]', "[f(b=2)]"):
        assert grammars.accepts(loose, call)
    assert not grammars.accepts(loose, "[f(z=1)]")


def test_a_reference_to_a_definition(grammars: Grammars) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/tree"}},
        "required": ["a"],
        "$defs": {"tree": TREE},
    }
    grammar = calls_of(grammars, schema, is_strict=True)
    assert grammars.accepts(grammar, '[f(a={"next": {"next": {}}})]')
    assert not grammars.accepts(grammar, '[f(a={"next": 1})]')


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ({"minProperties": 1}, '"minProperties" at #,'),
        ({"type": ["object", "null"]}, '"type" at #,'),
        ({"properties": {"a": INTEGER, "b c": INTEGER}}, '"b c" at #/properties,'),
        ({"properties": {"a": INTEGER, "": INTEGER}, "required": [""]}, '"" at #/properties,'),
    ],
)
def test_what_is_said_of_all_arguments_together(grammars: Grammars, said: dict[str, Any], what: str) -> None:
    """It is refused where it would not hold, and a call that could not be read is never asked for."""
    schema = {"type": "object", "properties": {"a": INTEGER}, **said}
    with pytest.raises(InvalidRequest, match=f"of f has {what}"):
        calls_of(grammars, schema, is_strict=True)
    loose = calls_of(grammars, schema, is_strict=False)
    for call in ("[f()]", "[f(a=1)]", '[f(a="x")]'):
        assert grammars.accepts(loose, call)
    for call in ("[f(b c=1)]", "[f(=1)]"):
        assert not grammars.accepts(loose, call)


def test_arguments_that_are_all_somewhere_else(grammars: Grammars) -> None:
    properties = {"a": INTEGER, "b": {"$ref": "#/$defs/all"}}
    whole = {"type": "object", "properties": properties, "required": ["a"]}
    definitions = {"one": {"$ref": "#/$defs/all"}, "all": whole}
    schema = {"$ref": "#/$defs/one", "description": "Whatever", "$defs": definitions}
    for is_strict in (True, False):
        grammar = calls_of(grammars, schema, is_strict=is_strict)
        assert grammars.accepts(grammar, '[f(a=1, b={"a": 2})]')
        for call in ("[f()]", '[f(a="x")]', '[f(a=1, b={"a": "x"})]', "[f(a=1, c=1)]"):
            assert not grammars.accepts(grammar, call)
    whole["minProperties"] = 1  # cannot be enforced
    with pytest.raises(InvalidRequest, match='of f has "minProperties" at #,'):
        calls_of(grammars, schema, is_strict=True)
    loose = calls_of(grammars, schema, is_strict=False)
    assert grammars.accepts(loose, '[f(a="x")]') and not grammars.accepts(loose, "[f(c=1)]")


@pytest.mark.parametrize("ref", ["#", "#/$defs/loop", "#/$defs/none", "elsewhere.json", 5])
def test_a_reference_to_no_arguments(grammars: Grammars, ref: Any) -> None:
    schema = {"$ref": ref, "$defs": {"loop": {"$ref": "#/$defs/loop"}}}
    with pytest.raises(InvalidRequest, match=r"of f "):
        calls_of(grammars, schema, is_strict=True)


def test_wrong_properties_of_what_is_no_object(grammars: Grammars) -> None:
    with pytest.raises(InvalidRequest, match='of f has "type" at #,'):
        calls_of(grammars, {"type": "string", "properties": 5}, is_strict=True)
