"""The tools of a request: what the model may call, and whether it must."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from engine.server.fields import Fields

MAX_TOOLS = 128
MAX_NAME_CHARS = 64
MAX_DESCRIPTION_CHARS = 2**16
TOOL_NAME = f"[a-zA-Z0-9_.-]{{1,{MAX_NAME_CHARS}}}"
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Function:
    """A function that the model may call. Without parameters it takes none."""

    name: str
    description: str | None
    parameters: dict[str, Any] | None
    is_strict: bool

    def shown(self, *, needs_description: bool = False) -> dict[str, Any]:
        """The tool as templates take it."""
        has_none = self.description is None and not needs_description
        description = {} if has_none else {"description": self.description or ""}
        parameters = {"type": "object", "properties": {}} if self.parameters is None else self.parameters
        return {"type": "function", "function": {"name": self.name, **description, "parameters": parameters}}

    @property
    def schema(self) -> dict[str, Any]:
        """What the arguments must be."""
        return _NO_PARAMETERS if self.parameters is None else self.parameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolUse:
    """Tools as a request offers them. `callable` are those that may be called; there is one at least."""

    offered: tuple[Function, ...]
    callable: tuple[Function, ...]
    is_required: bool
    is_parallel: bool
    is_instead_of_answer: bool = False
    """An answer without calls has a constraint of its own: then there are either calls, or it."""

    @property
    def names(self) -> frozenset[str]:
        return frozenset(function.name for function in self.callable)


def read_tools(fields: Fields) -> ToolUse | None:
    """None if the model is to call nothing: then it is not shown any tools. Raises `InvalidRequest`."""
    offered = _functions(fields)
    is_parallel = fields.boolean("parallel_tool_calls", default=True)
    mode, names = _choice(fields)
    if not offered:
        if mode == "required":
            raise fields.fail("tool_choice", "needs tools")
        return None
    if mode == "none":
        return None
    known = {function.name: function for function in offered}
    for name in names or ():
        if name not in known:
            raise fields.fail("tool_choice", f"names {name!r:.80}, which is not among the tools")
    return ToolUse(
        offered=offered,
        callable=offered if names is None else tuple(known[name] for name in names),
        is_required=mode == "required",
        is_parallel=is_parallel,
    )


def _functions(fields: Fields) -> tuple[Function, ...]:
    tools = fields.objects("tools")
    if len(tools) > MAX_TOOLS:
        raise fields.fail("tools", f"may hold at most {MAX_TOOLS} tools, got {len(tools)}")
    functions = tuple(map(_function, tools))
    seen: set[str] = set()
    for tool, function in zip(tools, functions, strict=True):
        if function.name in seen:
            raise tool.fail("function.name", f"is not unique: {function.name!r}")
        seen.add(function.name)
    return functions


def _function(tool: Fields) -> Function:
    _require_function_type(tool)
    tool.require("function")
    function = tool.object("function")
    function.require("name")
    name = function.text("name") or ""
    if not re.fullmatch(TOOL_NAME, name):
        raise function.fail(
            "name", f"must have 1 to {MAX_NAME_CHARS} letters, digits, _, - or ., got {name!r:.80}"
        )
    description = function.text("description")
    if description is not None and len(description) > MAX_DESCRIPTION_CHARS:
        raise function.fail("description", f"must have at most {MAX_DESCRIPTION_CHARS} characters")
    return Function(
        name=name,
        description=description,
        parameters=function.mapping("parameters"),
        is_strict=function.boolean("strict"),
    )


def _require_function_type(fields: Fields) -> None:
    fields.require("type")
    if (kind := fields.text("type")) != "function":
        raise fields.fail("type", f"{kind!r:.40} is not supported", slug="unsupported_parameter")


def _choice(fields: Fields) -> tuple[str, tuple[str, ...] | None]:
    """How much a call is wanted, and the names to choose from; None for all."""
    choice = fields.peek("tool_choice")
    if not isinstance(choice, dict):
        fields.raw("tool_choice")
        if choice not in (None, "none", "auto", "required"):
            raise fields.fail(
                "tool_choice", "must be none, auto, required, or an object that names a function"
            )
        return choice or "auto", None
    given = fields.object("tool_choice")
    if choice.get("type") != "allowed_tools":
        return "required", (_named(given),)
    given.raw("type")
    given.require("allowed_tools")
    allowed = given.object("allowed_tools")
    mode = allowed.text("mode") or "auto"
    if mode not in ("auto", "required"):
        raise allowed.fail("mode", f"must be auto or required, got {mode!r:.40}")
    names = tuple(dict.fromkeys(map(_named, allowed.objects("tools"))))
    if not names:
        raise allowed.fail("tools", "must not be empty")
    return mode, names


def _named(fields: Fields) -> str:
    _require_function_type(fields)
    fields.require("function")
    function = fields.object("function")
    function.require("name")
    return function.text("name") or ""
