"""The messages of a chat request, as the chat template takes them."""

from __future__ import annotations

from typing import Any

from engine.server.fields import Fields

ROLES = ("system", "user", "assistant", "tool", "developer", "function")
MAX_MESSAGES = 16384
MAX_CALLS = 1024
_MEANT = {"developer": "system", "function": "tool"}
"""Roles of OpenAI's that templates do not know, and those that they do."""

_ASSISTANT_ONLY: dict[str, tuple[Any, ...]] = {
    "tool_calls": ([],),
    "reasoning_content": ("",),
    "reasoning": ("",),
}


def read_messages(fields: Fields) -> list[dict[str, Any]]:
    """The conversation. Results of tools get the name of the tool, which some templates show.

    Raises `InvalidRequest` naming the field.
    """
    value = fields.peek("messages")
    if isinstance(value, list) and len(value) > MAX_MESSAGES:
        raise fields.fail("messages", f"may hold at most {MAX_MESSAGES} messages")
    messages: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for given in fields.objects("messages"):
        message = _message(given)
        for call in message.get("tool_calls", ()):
            names[call["id"]] = call["function"]["name"]
        if message.get("tool_call_id") in names:
            message.setdefault("name", names[message["tool_call_id"]])
        messages.append(message)
    if not messages:
        raise fields.fail("messages", "must not be empty")
    return messages


def _message(fields: Fields) -> dict[str, Any]:
    fields.require("role")
    role = fields.text("role")
    if role not in ROLES:
        raise fields.fail("role", f"must be one of {', '.join(ROLES)}, got {role!r:.40}")
    if role != "assistant" and not fields.is_given("content"):
        raise fields.fail("content", "is required", slug="missing_required_parameter")
    fields.refuse({"function_call": (), "audio": ()}, ("function_call", "audio"))
    message = {"role": _MEANT.get(role, role), "content": _content(fields)}
    for name in ("name", "tool_call_id"):
        if (value := fields.text(name)) is not None:
            message[name] = value
    if role != "assistant":
        fields.refuse(_ASSISTANT_ONLY, _ASSISTANT_ONLY)
        return message
    reasoning, other = fields.text("reasoning_content"), fields.text("reasoning")
    if reasoning or other:
        message["reasoning_content"] = reasoning or other
    if calls := [_call(call) for call in fields.objects("tool_calls")]:
        if len(calls) > MAX_CALLS:
            raise fields.fail("tool_calls", f"may hold at most {MAX_CALLS} calls, got {len(calls)}")
        message["tool_calls"] = calls
    return message


def _call(fields: Fields) -> dict[str, Any]:
    """Arguments may be JSON text, or the object itself; the template takes what it likes."""
    if (kind := fields.text("type")) not in (None, "function"):
        raise fields.fail("type", f"{kind!r:.40} is not supported", slug="unsupported_parameter")
    fields.require("function")
    function = fields.object("function")
    function.require("name")
    name = function.text("name")
    arguments = function.raw("arguments")
    if arguments is None:
        arguments = "{}"
    if not isinstance(arguments, (str, dict)):
        raise function.fail("arguments", "must be JSON text, or an object")
    return {
        "id": fields.text("id") or "",
        "type": "function",
        "function": {"name": name, "arguments": arguments or "{}"},
    }


def _content(fields: Fields) -> str | list[dict[str, str]]:
    """Text, or text parts as they are: the template decides how parts are joined."""
    if isinstance(fields.peek("content"), list):
        return [_part(part) for part in fields.objects("content")]
    return fields.text("content") or ""


def _part(fields: Fields) -> dict[str, str]:
    fields.require("type")
    if (kind := fields.text("type")) != "text":
        raise fields.fail("type", f"{kind!r:.40} is not supported", slug="unsupported_parameter")
    fields.require("text")
    return {"type": "text", "text": fields.text("text") or ""}
