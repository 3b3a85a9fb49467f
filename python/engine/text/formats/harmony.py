"""The channels of gpt-oss: analysis are thoughts, final is the answer, commentary may be a call.

Each message is <|start|>ROLE<|channel|>CHANNEL<|message|>TEXT and an end token; the prompt ends with
<|start|>assistant. A recipient (to=functions.NAME) stands before or behind the channel.

Source: https://cookbook.openai.com/articles/openai-harmony
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING

from engine.text.formats.json_calls import read_arguments
from engine.text.formats.reader import Reader, Stage, Steps
from engine.text.formats.tool_format import NAME, ToolFormat

if TYPE_CHECKING:
    from engine.text.tokenizer import Tokenizer

_START, _CHANNEL, _MESSAGE, _JSON = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
END = "<|end|>"
_ENDS = (END, "<|call|>", "<|return|>")
MARKERS = (_CHANNEL, _START, _MESSAGE, _JSON, *_ENDS)
THOUGHTS_NAME = f"analysis{_MESSAGE}"
THOUGHTS_OPENING = _CHANNEL + THOUGHTS_NAME
REMARK_OPENING = f"{_CHANNEL}commentary{_MESSAGE}"
ANSWER_OPENING = f"{_CHANNEL}final{_MESSAGE}"
TO_NEXT = f"{_START}assistant"
"""Between the end of a message and the next one."""

_MAX_HEADER_CHARS = 512
_RECIPIENT = re.compile(r"to=functions\.([^\s<]+)")


def read_messages(reader: Reader, *, separates: bool, ends_with_answer: bool) -> Steps[None]:
    """A whole output. Without `separates` thoughts are content, with all that marks them.

    `ends_with_answer`: nothing follows a final message, which may hold what looks like a mark.
    """
    while (yield from reader.pass_until((_START, _CHANNEL), reader.content)):
        header = yield from _peek_header(reader)
        if header is None:
            rest = reader.take(len(reader.text) if reader.is_complete else 1)
            if not reader.is_complete:
                reader.content(rest)
        elif (found := _RECIPIENT.search(header)) and found[1] in reader.tool_names:
            reader.stage = Stage.ANSWERING
            yield from reader.attempt(_read_call(reader, found[1], len(header)))
        else:
            is_last = ends_with_answer and header.endswith(ANSWER_OPENING)
            yield from _read_text(reader, header, () if is_last else _ENDS, separates=separates)


def _peek_header(reader: Reader) -> Steps[str | None]:
    """The header, <|message|> included, which is not taken; None if this is none, or an unfinished one."""
    while (at := reader.text.find(_MESSAGE, 0, _MAX_HEADER_CHARS)) < 0:
        if reader.is_complete or len(reader.text) >= _MAX_HEADER_CHARS:
            return None
        yield
    return reader.text[: at + len(_MESSAGE)]


def _read_call(reader: Reader, name: str, header_len: int) -> Steps[None]:
    reader.take(header_len)
    yield from read_arguments(reader, name)
    yield from reader.skip_space()
    for end in _ENDS:
        if (yield from reader.accept(end)):
            return


def _read_text(reader: Reader, header: str, ends: tuple[str, ...], *, separates: bool) -> Steps[None]:
    is_thought = f"{_CHANNEL}analysis" in header
    reader.stage = Stage.THINKING if is_thought else Stage.ANSWERING
    reader.has_thought |= is_thought
    reader.take(len(header))
    if is_thought and not separates:
        reader.content(header)
        emit = reader.content
    else:
        emit = reader.reasoning if is_thought else reader.content
    end = yield from reader.pass_until(ends, emit)
    if end is not None:
        reader.take(len(end))
        if is_thought and not separates:
            reader.content(end)
    if is_thought and separates:
        reader.end_reasoning()


@dataclasses.dataclass(frozen=True)
class Channels:
    """Thoughts in the analysis channel."""

    name: str = "gpt-oss"
    markers: tuple[str, ...] = MARKERS

    def is_opened_by(self, prompt: str) -> bool:
        """Whether what follows this prompt are thoughts already: the output says so itself."""
        return False

    def is_left_open_by(self, message: str) -> bool:
        """Whether the thoughts in the beginning of an answer are not ended yet: it holds none."""
        return False

    def marks(self, tokenizer: Tokenizer) -> tuple[int, int] | None:
        """The tokens that name a channel and that end a message; None if the vocabulary has none."""
        channel, end = tokenizer.token_id(_CHANNEL), tokenizer.token_id(END)
        if channel is None or end is None or end in tokenizer.eos_token_ids:
            return None
        return channel, end


CHANNELS = Channels()

HARMONY = ToolFormat(
    name="gpt-oss",
    read=lambda reader: read_messages(reader, separates=False, ends_with_answer=False),
    markers=MARKERS,
    begin=f"{_CHANNEL}commentary to=functions.{NAME} {_JSON}json{_MESSAGE}",
    end="",
)
