"""The message of a chat answer, whole and in pieces, from the events of its choice."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any

from engine.text.formats.events import (
    CallArguments,
    CallRejected,
    CallStart,
    Content,
    Event,
    Reasoning,
)


def message_parts(events: Iterable[Event]) -> list[dict[str, Any]]:
    """Deltas of a stream. A call comes with its id and name first, then with pieces of its arguments.

    A call that turns out to be none cannot be taken back: its text follows as content, and the finish
    reason is not "tool_calls" unless there is another one.
    """
    parts: list[dict[str, Any]] = []
    for event in events:
        match event:
            case Content(text):
                parts.append({"content": text})
            case Reasoning(text):
                parts.append({"reasoning_content": text})
            case CallStart(index, name):
                parts.append({"tool_calls": [{"index": index, **_call(name, "")}]})
            case CallArguments(index, text):
                parts.append({"tool_calls": [{"index": index, "function": {"arguments": text}}]})
    return parts


def whole_message(events: Iterable[Event]) -> dict[str, Any]:
    """The message. Its content is null beside calls, unless there is some."""
    content: list[str] = []
    reasoning: list[str] = []
    calls: dict[int, dict[str, Any]] = {}
    arguments: dict[int, list[str]] = {}
    for event in events:
        match event:
            case Content(text):
                content.append(text)
            case Reasoning(text):
                reasoning.append(text)
            case CallStart(index, name):
                calls[index], arguments[index] = _call(name, ""), []
            case CallArguments(index, text):
                arguments[index].append(text)
            case CallRejected(index):
                del calls[index]
    for index, call in calls.items():
        call["function"]["arguments"] = "".join(arguments[index])
    message: dict[str, Any] = {"role": "assistant", "content": "".join(content) or (None if calls else "")}
    if reasoning:
        message["reasoning_content"] = "".join(reasoning)
    if calls:
        message["tool_calls"] = list(calls.values())
    return message


def _call(name: str, arguments: str) -> dict[str, Any]:
    call_id = f"call_{uuid.uuid4().hex[:24]}"
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
