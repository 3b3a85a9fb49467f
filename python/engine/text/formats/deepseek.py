"""The special tokens of DeepSeek: calls in a fenced block (V3, R1), or bare (V3.1).

Source: the chat templates of DeepSeek-V3, R1 and V3.1.
"""

from __future__ import annotations

import dataclasses

from engine.text.formats.json_calls import read_arguments
from engine.text.formats.reader import Reader, Steps
from engine.text.formats.tool_format import NAME, ToolFormat

_ALL_BEGIN, _ALL_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_BEGIN, _SEPARATOR, _END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_TYPE = "function"
_FENCE, _FENCE_END = "```json\n", "\n```"


def _read(reader: Reader) -> Steps[None]:
    while (yield from reader.pass_until((_ALL_BEGIN,), reader.content)):
        yield from reader.attempt(_read_group(reader))


def _read_group(reader: Reader) -> Steps[None]:
    yield from reader.expect(_ALL_BEGIN)
    yield from reader.skip_space()
    yield from reader.expect(_BEGIN)
    yield from _read_one(reader)
    while (yield from reader.skip_space()) and (yield from reader.accept(_BEGIN)):
        yield from _read_one(reader)
    yield from reader.accept(_ALL_END)


def _read_one(reader: Reader) -> Steps[None]:
    """What closes a call may be missing: its arguments are complete without."""
    head, _ = yield from reader.take_until((_SEPARATOR,))
    if head.strip() == _TYPE and not (yield from reader.starts_with("{")):
        head, _ = yield from reader.take_until(("\n",))
        reader.name_call(head.strip())
        yield from reader.expect(_FENCE)
    yield from read_arguments(reader, head.strip())
    yield from reader.skip_space()
    if (yield from reader.accept("```")):
        yield from reader.skip_space()
    yield from reader.accept(_END)


DEEPSEEK_V3 = ToolFormat(
    name="deepseekv3",
    read=_read,
    markers=(_ALL_BEGIN, _ALL_END, _BEGIN, _SEPARATOR, _END),
    begin=f"{_BEGIN}{_TYPE}{_SEPARATOR}{NAME}\n{_FENCE}",
    end=f"{_FENCE_END}{_END}",
    before=_ALL_BEGIN,
    between="\n",
    after=_ALL_END,
    openings=(_ALL_BEGIN,),
)

DEEPSEEK_V31 = dataclasses.replace(
    DEEPSEEK_V3, name="deepseekv31", begin=f"{_BEGIN}{NAME}{_SEPARATOR}", end=_END, between=""
)
