"""What the arguments of a call must be, in the terms of structural tags."""

from __future__ import annotations

from typing import Any

from engine.errors import InvalidRequest
from engine.grammar.errors import GrammarError, Unenforceable
from engine.grammar.schema_keywords import ANNOTATIONS, enforceable, refusal
from engine.server.tag_formats import Format, sequence, text_format
from engine.server.tools import Function
from engine.text.formats.pythonic import ARGUMENT_NAME
from engine.text.formats.tool_format import ToolFormat


def arguments_format(function: Function, tools: ToolFormat) -> Format:
    """What the arguments of a call must be.

    Raises: `InvalidRequest` for a schema that is wrong.
    """
    schema = _arguments_schema(function, tools)
    return _python_arguments(schema) if tools.has_python_arguments else _json(schema)


def _arguments_schema(function: Function, tools: ToolFormat) -> dict[str, Any]:
    """What is enforced: the tool's schema, or if it is not strict and cannot be enforced, any object; where
    arguments are written one by one, any values of those that there are.

    Raises: `InvalidRequest` for a schema that is wrong.
    """
    schema = _without_reference(function.schema) if tools.has_python_arguments else function.schema
    try:
        enforceable(function.schema, is_parted=tools.has_python_arguments)
        if tools.has_python_arguments:
            _check_arguments(schema)
    except GrammarError as error:
        if isinstance(error, Unenforceable) and not function.is_strict:
            return _with_any_values(schema) if tools.has_python_arguments else {"type": "object"}
        raise InvalidRequest(f"tools: the schema of {function.name} {error}", param="tools") from None
    except RecursionError:
        raise InvalidRequest(
            f"tools: the schema of {function.name} is nested too deeply", param="tools"
        ) from None
    return schema


def _without_reference(schema: dict[str, Any]) -> dict[str, Any]:
    """What a schema that is a reference leads to, with the definitions of the whole; itself if to nothing."""
    definitions = {name: schema[name] for name in _DEFINITIONS if name in schema}
    found, seen = schema, set[str]()
    while isinstance(ref := found.get("$ref"), str) and ref.startswith("#/") and ref not in seen:
        seen.add(ref)
        target: Any = schema
        for step in ref.split("/")[1:]:
            target = target.get(step) if isinstance(target, dict) else None
        if not isinstance(target, dict):
            break
        found = target
    return {**found, **definitions}


_DEFINITIONS = ("$defs", "definitions")
_OF_ARGUMENTS = ANNOTATIONS | {
    *_DEFINITIONS,
    "type",
    "properties",
    "required",
    "additionalProperties",
    "unevaluatedProperties",
    "$id",
}
"""What a schema may say of all arguments, where they are written one by one."""


def _check_arguments(schema: dict[str, Any]) -> None:
    """Raises: `Unenforceable` for what is said of the object beside its properties, and for their names."""
    where = "where arguments are written as Python"
    for keyword in schema:
        if keyword not in _OF_ARGUMENTS and not keyword.startswith("x-"):
            raise refusal("#", keyword, f"is not supported {where}")
    if schema.get("type", "object") != "object":
        raise refusal("#", "type", f"is supported as object only {where}")
    for name in schema.get("properties", {}):
        if not ARGUMENT_NAME.fullmatch(name):
            raise refusal("#/properties", name[:40], f"is not supported as a name {where}")


def _with_any_values(schema: dict[str, Any]) -> dict[str, Any]:
    names = schema.get("properties")
    readable = filter(ARGUMENT_NAME.fullmatch, names if isinstance(names, dict) else ())
    return {"type": "object", "properties": dict.fromkeys(readable, True)}


def _json(schema: Any) -> Format:
    """JSON as the templates write it, which is how models were taught."""
    return {"type": "json_schema", "json_schema": schema, "is_spaced": True}


def _python_arguments(schema: dict[str, Any]) -> Format:
    """key=value, the required ones first; values in JSON, which readers of Python's literals take too."""
    properties = schema.get("properties") or {}
    required = [name for name in properties if name in schema.get("required", ())]
    optional = [name for name in properties if name not in required]
    shared = {name: schema[name] for name in _DEFINITIONS if name in schema}

    def argument(name: str) -> Format:
        value = properties[name]
        return sequence(
            text_format(f"{name}="), _json({**value, **shared} if isinstance(value, dict) else value)
        )

    def more(name: str) -> Format:
        return sequence(text_format(", "), argument(name))

    rest = [{"type": "optional", "content": more(name)} for name in optional]
    if required:
        first, *others = required
        return sequence(argument(first), *map(more, others), *rest)
    # Any of the optional ones may be the first that is there.
    starts = [sequence(argument(name), *rest[i + 1 :]) for i, name in enumerate(optional)]
    return {"type": "optional", "content": {"type": "or", "elements": starts}} if starts else text_format("")
