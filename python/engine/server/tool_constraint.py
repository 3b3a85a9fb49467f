"""What makes a model's calls right: a structural tag over its whole answer.

With tool_choice auto the answer is free until a call begins as its format begins calls; from there on
the name is one of those that may be called, and the arguments are as that tool's schema says. With
required, or a named tool, the answer is nothing but calls.
"""

from __future__ import annotations

from typing import Any

import msgspec

from engine.errors import InvalidRequest
from engine.grammar.errors import GrammarError, Unenforceable
from engine.grammar.schema_keywords import ANNOTATIONS, enforceable, refusal
from engine.sampling.constraint import Constraint
from engine.server.channel_constraint import in_messages
from engine.server.tag_formats import Format, answer_format, sequence, text_format
from engine.server.tools import Function, ToolUse
from engine.text.formats.harmony import HARMONY
from engine.text.formats.pythonic import ARGUMENT_NAME
from engine.text.formats.tool_format import NAME, ToolFormat

Schemas = dict[str, dict[str, Any]]
"""What the arguments of each tool must be, by its name."""


def tool_constraint(tools: ToolFormat, use: ToolUse, answer: Constraint | None) -> Constraint:
    """The constraint for calls in this format; `answer` is the one on an answer without calls.

    Raises: `InvalidRequest` if there is both a demand for calls and one for an answer.
    """
    schemas = {function.name: _arguments_schema(function, tools) for function in use.callable}
    if use.is_required and answer is not None:
        raise InvalidRequest(
            f"{answer.param} cannot be combined with a tool_choice that demands a call", param=answer.param
        )
    if tools is HARMONY:
        found = in_messages(_only_calls(tools, use, schemas), answer, may_answer=not use.is_required)
    elif use.is_required:
        found = _only_calls(tools, use, schemas)
    elif answer is not None:
        found = {"type": "or", "elements": [answer_format(answer), _only_calls(tools, use, schemas)]}
    else:
        found = _calls_in_text(tools, use, schemas)
    tag = {"type": "structural_tag", "format": found}
    return Constraint("structural_tag", msgspec.json.encode(tag).decode(), param="tools")


def _only_calls(tools: ToolFormat, use: ToolUse, schemas: Schemas) -> Format:
    return sequence(text_format(tools.before), _list(tools, use, schemas), text_format(tools.after))


def _calls_in_text(tools: ToolFormat, use: ToolUse, schemas: Schemas) -> Format:
    """Text in which whatever opens a call is followed by the rest of a right one."""
    if not tools.openings:
        group = {
            "type": "tag",
            "begin": tools.before,
            "content": _list(tools, use, schemas),
            "end": tools.after,
        }
        # What begins calls for their reader, though it be written in another way than the grammar does.
        trigger = next(marker for marker in tools.markers if tools.before.startswith(marker))
        tags, triggers = [group], [trigger]
        excludes = [marker for marker in tools.markers if marker != trigger]
    else:
        end = tools.end if use.is_parallel else tools.end + tools.after
        pairs = [(opening, name) for name in schemas for opening in tools.openings]
        tags = [_tag(_begin(tools, opening), tools, name, schemas[name], end) for opening, name in pairs]
        triggers = list(dict.fromkeys(opening.replace(NAME, name) for opening, name in pairs))
        excludes = []
    return {
        "type": "triggered_tags",
        "triggers": triggers,
        "tags": tags,
        "excludes": excludes,
        "stop_after_first": not use.is_parallel,
    }


def _list(tools: ToolFormat, use: ToolUse, schemas: Schemas) -> Format:
    """One call or more."""
    return {
        "type": "tags_with_separator",
        "tags": [_tag(tools.begin, tools, name, schema, tools.end) for name, schema in schemas.items()],
        "separator": tools.between,
        "at_least_one": True,
        "stop_after_first": not use.is_parallel,
    }


def _begin(tools: ToolFormat, opening: str) -> str:
    """How a call with this opening begins."""
    return tools.begin if tools.begin.startswith(opening) else opening


def _tag(begin: str, tools: ToolFormat, name: str, schema: Any, end: str) -> Format:
    return {
        "type": "tag",
        "begin": begin.replace(NAME, name),
        "content": _python_arguments(schema) if tools.has_python_arguments else _json(schema),
        "end": end,
    }


def _arguments_schema(function: Function, tools: ToolFormat) -> dict[str, Any]:
    """What is enforced: the tool's schema, or if it is not strict and cannot be enforced, any object; where
    arguments are written one by one, any values of those that there are.

    Raises: `InvalidRequest` for a schema that is wrong.
    """
    try:
        enforceable(function.schema, is_parted=tools.has_python_arguments)
        if tools.has_python_arguments:
            _check_arguments(function.schema)
    except GrammarError as error:
        if isinstance(error, Unenforceable) and not function.is_strict:
            return _with_any_values(function.schema) if tools.has_python_arguments else {"type": "object"}
        raise InvalidRequest(f"tools: the schema of {function.name} {error}", param="tools") from None
    except RecursionError:
        raise InvalidRequest(
            f"tools: the schema of {function.name} is nested too deeply", param="tools"
        ) from None
    return function.schema


_OF_ARGUMENTS = ANNOTATIONS | {
    "type",
    "properties",
    "required",
    "additionalProperties",
    "unevaluatedProperties",
    "$defs",
    "definitions",
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
    shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}

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
