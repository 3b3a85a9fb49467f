"""How the answers of a chat request are to be read, and whether its tools can be served at all."""

from __future__ import annotations

import dataclasses

import msgspec
import numpy as np

from engine.errors import InvalidRequest
from engine.sampling.constraint import Constraint, Thinking, ThoughtMessages
from engine.sampling.params import SamplingParams
from engine.server.channel_constraint import answer_in_messages
from engine.server.model_files import ModelFiles
from engine.server.schema import ChatRequest
from engine.server.tool_constraint import tool_constraint
from engine.server.tools import ToolUse
from engine.text.formats.detect import ModelFormats
from engine.text.formats.harmony import HARMONY, Channels
from engine.text.formats.known import ThoughtFormat, marker_ids
from engine.text.formats.output import OutputFormat
from engine.text.formats.thinking import ThinkTags
from engine.text.formats.tool_format import ToolFormat
from engine.text.tokenizer import Tokenizer

_NO_MARKS = "what marks its thoughts are no tokens of its vocabulary"


def with_whole_constraint(model: ModelFiles, asked: ChatRequest, *, is_parsing: bool) -> ChatRequest:
    """The request with a constraint that makes calls right, and the messages that its answer is made of.

    Without `is_parsing` calls are wanted as text.
    Raises: `InvalidRequest` if the model cannot be told of tools, or its calls could not be read.
    """
    constraint, use = asked.params.constraint, asked.tools
    if use is not None:
        _check_tools(model, asked, use, is_parsing=is_parsing)
        use = dataclasses.replace(use, is_instead_of_answer=constraint is not None)
    if use is not None and model.formats.tools is not None:
        constraint = _calls_constraint(model, model.formats.tools, use, constraint)
    elif _has_messages(model.formats, asked) and (
        constraint is not None or asked.thoughts.budget is not None
    ):
        constraint = answer_in_messages(constraint, "thinking_budget")
    params = msgspec.structs.replace(asked.params, constraint=constraint)
    return dataclasses.replace(asked, params=params, tools=use)


def _calls_constraint(
    model: ModelFiles, tools: ToolFormat, use: ToolUse, answer: Constraint | None
) -> Constraint:
    tags = model.formats.thoughts
    if not isinstance(tags, ThinkTags):
        return tool_constraint(tools, use, answer)
    return tool_constraint(tools, use, answer, tags, has_written_tags=model.tags is None)


def _check_tools(model: ModelFiles, asked: ChatRequest, tools: ToolUse, *, is_parsing: bool) -> None:
    if not model.chat_template.shows_tools:
        raise _unsupported("tools", "the model's chat template has no place for tools")
    if model.formats.tools is None and tools.is_required:
        raise _unsupported("tool_choice", "calls can be demanded only in a format that is known here")
    if model.formats.tools is None and is_parsing:
        raise _unsupported(
            "tools",
            "the model writes calls in a format that is not known here; start the server with "
            "--tool-call-parser and the name of one, or with none to get calls as text",
        )
    if asked.continue_final_message and model.formats.tools is HARMONY:
        raise _unsupported("continue_final_message", "no call can follow in a message that has begun")


def _has_messages(formats: ModelFormats, asked: ChatRequest) -> bool:
    """Whether all of the answer is in messages that it begins itself."""
    has_channels = isinstance(formats.thoughts, Channels)
    if asked.tools is not None and formats.tools is not None:
        has_channels = formats.tools is HARMONY
    return has_channels and not asked.continue_final_message


def choose_output_format(model: ModelFiles, asked: ChatRequest, prompt: str) -> OutputFormat | None:
    """How to read answers to this prompt; None if they are nothing but content."""
    formats = model.formats
    tools = None if asked.tools is None else formats.tools
    thoughts = formats.thoughts
    starts_thinking = thoughts is not None and _is_thinking(thoughts, asked, prompt)
    if tools is None and not starts_thinking and _is_all_answer(model, asked):
        thoughts = None
    if tools is None and thoughts is None:
        return None
    output_format = OutputFormat(
        thoughts=thoughts,
        tools=tools,
        tool_names=frozenset() if asked.tools is None else asked.tools.names,
        starts_thinking=starts_thinking,
        separates_thoughts=asked.thoughts.separates,
        streams_thoughts=asked.thoughts.streams,
        is_calls_or_answer=asked.tools is not None and asked.tools.is_instead_of_answer,
        ends_with_answer=asked.params.constraint is not None and _has_messages(formats, asked),
        keeps_space=_is_answer_constrained(asked),
    )
    if model.tags is None or not asked.params.skip_special_tokens:
        return dataclasses.replace(output_format, tags=model.tags)
    hidden = model.tokenizer.special_ids - shown_ids(model.tokenizer, asked.params, output_format)
    return dataclasses.replace(output_format, tags=model.tags._replace(blank=model.tags.blank | hidden))


def _is_all_answer(model: ModelFiles, asked: ChatRequest) -> bool:
    """Whether the constraint holds from the first token on: where thoughts are marked by letters alone, none
    come before it, and what looks like their mark is the answer's own."""
    has_marks = model.tags is not None or isinstance(model.formats.thoughts, Channels)
    return asked.params.constraint is not None and asked.thoughts.budget is None and not has_marks


def _is_answer_constrained(asked: ChatRequest) -> bool:
    if asked.tools is not None:  # which are a constraint by themselves
        return asked.tools.is_instead_of_answer
    return asked.params.constraint is not None


def shown_ids(
    tokenizer: Tokenizer, params: SamplingParams, output_format: OutputFormat | None
) -> frozenset[int]:
    """Special tokens that are not left out of the text."""
    shown = frozenset[int]() if params.constraint is None else marker_ids(tokenizer)
    return shown if output_format is None else shown | output_format.special_ids(tokenizer)


def choose_thinking(
    tokenizer: Tokenizer, output_format: OutputFormat | None, asked: ChatRequest
) -> Thinking | ThoughtMessages | None:
    """What the engine has to know of the thoughts: only where an answer behind them is constrained, or
    where they are bounded.

    Raises: `InvalidRequest` if that cannot be done: what marks them are no tokens, or none are known.
    """
    constraint, budget = asked.params.constraint, asked.thoughts.budget
    if output_format is None or output_format.thoughts is None:
        if budget is not None:
            raise _unsupported("thinking_budget", "it has no thoughts, or in no format that is known here")
        return None
    if constraint is None and budget is None:
        return None
    if isinstance(output_format.thoughts, Channels):
        return _choose_messages(output_format.thoughts, tokenizer, asked)
    tags = output_format.tags
    if tags is None:
        if budget is None and not output_format.starts_thinking:
            return None
        param = "thinking_budget" if constraint is None else constraint.param
        raise _unsupported(param, _NO_MARKS)
    if output_format.starts_thinking:
        return Thinking(end=(tags.end,), budget=budget, closing=(tags.end,))
    blank = np.array(sorted(tags.blank), "<i4").tobytes()
    return Thinking(end=(tags.end,), start=tags.start, budget=budget, closing=(tags.end,), blank=blank)


def _choose_messages(thoughts: Channels, tokenizer: Tokenizer, asked: ChatRequest) -> ThoughtMessages | None:
    """The constraint covers all messages: only a budget has to be told beside it."""
    if asked.thoughts.budget is None:
        return None
    if asked.continue_final_message:
        raise _unsupported("thinking_budget", "no thoughts can be bounded in a message that has begun")
    marks = thoughts.marks(tokenizer)
    if marks is None or asked.params.constraint is None:
        raise _unsupported("thinking_budget", _NO_MARKS)
    channel, end = marks
    return ThoughtMessages(channel=channel, end=end, budget=asked.thoughts.budget)


def _is_thinking(thoughts: ThoughtFormat, asked: ChatRequest, prompt: str) -> bool:
    if not asked.continue_final_message:
        return thoughts.is_opened_by(prompt)
    content = asked.messages[-1]["content"]
    parts = [content] if isinstance(content, str) else [part["text"] for part in content]
    return thoughts.is_left_open_by("".join(parts))


def _unsupported(param: str, what: str) -> InvalidRequest:
    return InvalidRequest(
        f"{param} is not supported for this model: {what}", slug="unsupported_parameter", param=param
    )
