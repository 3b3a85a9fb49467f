"""What makes a model's calls right: a structural tag over its whole answer.

With tool_choice auto the answer is free until calls are opened, in any way that the reader of their format
knows; from there on the name is one of those that may be called, and the arguments are as that tool's schema
says. With required, or a named tool, the answer is nothing but calls.
"""

from __future__ import annotations

import msgspec

from engine.errors import InvalidRequest
from engine.sampling.constraint import Constraint
from engine.server.channel_constraint import in_messages
from engine.server.tag_formats import Format, answer_format, sequence, text_format
from engine.server.tool_arguments import arguments_format
from engine.server.tools import ToolUse
from engine.text.formats.harmony import HARMONY
from engine.text.formats.thinking import ThinkTags
from engine.text.formats.tool_format import NAME, ToolFormat

_MORE_CALLS = "more calls"
"""The definition of what may follow a first one; the others have names of tools, which hold no spaces."""


def tool_constraint(
    tools: ToolFormat,
    use: ToolUse,
    answer: Constraint | None,
    tags: ThinkTags | None = None,
    *,
    has_written_tags: bool = False,
) -> Constraint:
    """The constraint for calls in this format; `answer` is the one on an answer without calls.

    `tags` are those around thoughts that may come first. They are no part of what is constrained, unless
    the vocabulary has no tokens for them (`has_written_tags`).

    Raises: `InvalidRequest` if there is both a demand for calls and one for an answer.
    """
    if use.is_required and answer is not None:
        raise InvalidRequest(
            f"{answer.param} cannot be combined with a tool_choice that demands a call", param=answer.param
        )
    if tools is HARMONY:
        found = in_messages(_only_calls(tools, use), answer, may_answer=not use.is_required)
    elif use.is_required:
        found = _only_calls(tools, use)
    elif answer is not None:
        found = _calls_or_answer(tools, use, answer, tags)
    else:
        found = _calls_in_text(tools, use, tags)
        if tags is not None and has_written_tags:
            found = sequence({"type": "optional", "content": _written_thoughts(tags)}, found)
    definitions = {function.name: arguments_format(function, tools) for function in use.callable}
    if tools.after:
        definitions[_MORE_CALLS] = _more_calls(tools, use)
    tag = {"type": "structural_tag", "definitions": definitions, "format": found}
    return Constraint("structural_tag", msgspec.json.encode(tag).decode(), param="tools")


def _only_calls(tools: ToolFormat, use: ToolUse) -> Format:
    return sequence(text_format(tools.before), _list(tools, use), text_format(tools.after))


def _calls_or_answer(tools: ToolFormat, use: ToolUse, answer: Constraint, tags: ThinkTags | None) -> Format:
    """Either of them from the first character on, which must tell what it is."""
    apart = tools.first_calls(use.names)
    if tags is not None:
        apart.append(tags.start)
    return {"type": "or", "elements": [answer_format(answer), _only_calls(tools, use)], "apart": apart}


def _written_thoughts(tags: ThinkTags) -> Format:
    text = {"type": "any_text", "excludes": [tags.end]}
    return {"type": "tag", "begin": tags.start, "content": text, "end": tags.end}


def _calls_in_text(tools: ToolFormat, use: ToolUse, tags: ThinkTags | None) -> Format:
    """Text in which whatever opens calls is followed by the rest of right ones, and nothing else looks like
    a part of one, or like the beginning of thoughts."""
    parts = [m for m in tools.markers if not any(m in opening for opening in tools.openings)]
    return {
        "type": "triggered_tags",
        "triggers": tools.named_openings(use.names),
        "tags": [tag for opening in tools.openings for tag in _tags_behind(opening, tools, use)],
        "excludes": parts if tags is None else [*parts, tags.start],
        "stop_after_first": not use.is_parallel,
    }


def _tags_behind(opening: str, tools: ToolFormat, use: ToolUse) -> list[Format]:
    """The calls that begin with this."""
    names = sorted(use.names)
    if not tools.after:
        begin = opening if NAME in opening else opening + tools.begin.removeprefix(opening)
        return [_tag(begin, name, _arguments(name), tools.end) for name in names]
    if NAME in opening:
        rest = sequence(text_format(tools.end), {"type": "definition", "name": _MORE_CALLS})
        return [_tag(opening, name, sequence(_arguments(name), rest), tools.after) for name in names]
    closing = "" if tools.before.startswith(opening) else tools.closing
    content = sequence(text_format(tools.before.removeprefix(opening)), _list(tools, use))
    return [{"type": "tag", "begin": opening, "content": content, "end": tools.after + closing}]


def _more_calls(tools: ToolFormat, use: ToolUse) -> Format:
    """What may follow a first call in the same brackets."""
    if not use.is_parallel:
        return text_format("")
    calls = [_tag(tools.begin, name, _arguments(name), tools.end) for name in sorted(use.names)]
    call = sequence(text_format(tools.between), {"type": "or", "elements": calls})
    return {"type": "star", "content": call}


def _list(tools: ToolFormat, use: ToolUse) -> Format:
    """One call or more."""
    return {
        "type": "tags_with_separator",
        "tags": [_tag(tools.begin, name, _arguments(name), tools.end) for name in sorted(use.names)],
        "separator": tools.between,
        "at_least_one": True,
        "stop_after_first": not use.is_parallel,
    }


def _tag(begin: str, name: str, content: Format, end: str) -> Format:
    return {"type": "tag", "begin": begin.replace(NAME, name), "content": content, "end": end}


def _arguments(name: str) -> Format:
    """Those of a tool, as the definitions have them."""
    return {"type": "definition", "name": name}
