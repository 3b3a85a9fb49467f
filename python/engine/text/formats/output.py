"""One output, read as its text arrives: thoughts first, then content and calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable

from engine.text.formats.channel_tokens import ChannelTokens
from engine.text.formats.events import Event
from engine.text.formats.harmony import CHANNELS, HARMONY, Channels, read_messages
from engine.text.formats.known import ThoughtFormat
from engine.text.formats.reader import Reader, Stage, Steps
from engine.text.formats.tag_tokens import TagIds, TagTokens
from engine.text.formats.thinking import ThinkTags, read_thoughts
from engine.text.formats.tool_format import ToolFormat
from engine.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class OutputFormat:
    """How to read the outputs of one request; None for what the outputs do not have.

    `starts_thinking`: the prompt has begun the thoughts. Without `separates_thoughts` they are left
    in the content, as the model wrote them; without `streams_thoughts` they come in one piece.
    `ends_with_answer`: a constraint lets nothing follow the answer itself. `is_calls_or_answer`: the
    output is nothing but calls, or has none, whatever it looks like. With `tags` thoughts are between
    these tokens; without, between their text, however it is spelled. `keeps_space`: behind thoughts white
    space belongs to the answer, which is held to a constraint.
    """

    thoughts: ThoughtFormat | None = None
    tools: ToolFormat | None = None
    tool_names: Collection[str] = ()
    starts_thinking: bool = False
    separates_thoughts: bool = True
    streams_thoughts: bool = True
    ends_with_answer: bool = False
    is_calls_or_answer: bool = False
    tags: TagIds | None = None
    keeps_space: bool = False

    def special_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Special tokens that must not be hidden from the text."""
        markers = [marker for part in (self.thoughts, self.tools) if part for marker in part.markers]
        return tokenizer.special_ids.intersection(map(tokenizer.token_id, markers))

    def thought_tokens(self, tokenizer: Tokenizer) -> ChannelTokens | TagTokens | None:
        """What tells thoughts by their tokens, where what marks them has tokens."""
        if self.tags is not None:
            start_id = None if self.starts_thinking else self.tags.start
            return TagTokens(start_id, (self.tags.end,), self.tags.blank)
        if not isinstance(self.thoughts, Channels):
            return None
        marks = self.thoughts.marks(tokenizer)
        return None if marks is None else ChannelTokens(*marks, tokenizer.token_bytes)


class OutputParser:
    """Turns the text of one output into events. Nothing that it reports depends on how the text is cut,
    but the sizes of pieces; every character is reported, except markers, and white space next to them.
    """

    def __init__(self, output_format: OutputFormat) -> None:
        self._reader = Reader(output_format.tool_names, keeps_space=output_format.keeps_space)
        if output_format.tags is not None:
            self._reader.tag_starts = set()
        self._steps = _read(self._reader, output_format)
        self._is_read = False

    @property
    def stage(self) -> Stage:
        """What the newest text belongs to."""
        return self._reader.stage

    @property
    def has_thought(self) -> bool:
        """Whether thoughts have begun, if only in name."""
        return self._reader.has_thought

    def push(self, text: str, tag_starts: Iterable[int] = ()) -> list[Event]:
        """Take more text; what is now certain. `tag_starts`: where tokens of tags begin in the whole text."""
        if self._reader.tag_starts is not None:
            self._reader.tag_starts.update(tag_starts)
        if text and not self._is_read:
            self._reader.text += text
            self._advance()
        return self._reader.take_events()

    def finish(self, *, is_cut: bool) -> list[Event]:
        """The text has ended; `is_cut`: not because the model ended it."""
        reader = self._reader
        reader.is_complete, reader.is_cut = True, is_cut
        self._advance()
        assert self._is_read, "a parser waits for text that will not come"
        return reader.take_events()

    def _advance(self) -> None:
        try:
            next(self._steps)
        except StopIteration:
            self._is_read = True


def _read(reader: Reader, output_format: OutputFormat) -> Steps[None]:
    thoughts, tools = output_format.thoughts, output_format.tools
    separates = output_format.separates_thoughts
    if thoughts is CHANNELS or tools is HARMONY:
        separates = separates and thoughts is CHANNELS
        ends = output_format.ends_with_answer
        yield from read_messages(reader, separates=separates, ends_with_answer=ends)
    else:
        if isinstance(thoughts, ThinkTags):
            is_open = output_format.starts_thinking
            yield from read_thoughts(reader, thoughts, is_open=is_open, separates=separates)
        reader.stage = Stage.ANSWERING
        if tools is not None and (yield from _may_call(reader, output_format, tools)):
            yield from tools.read(reader)
        yield from reader.pass_until((), reader.content)
    reader.finish()


def _may_call(reader: Reader, output_format: OutputFormat, tools: ToolFormat) -> Steps[bool]:
    if not output_format.is_calls_or_answer:
        return True
    return (yield from reader.starts_with_any(tools.first_calls(reader.tool_names)))
