"""<tool_call>{"name": …, "arguments": …}</tool_call>: Hermes 2 and 3, Qwen 2.5 and 3, the bundled model.

Source: https://github.com/NousResearch/Hermes-Function-Calling; the chat templates of Qwen.
"""

from __future__ import annotations

from engine.text.formats.json_calls import read_call
from engine.text.formats.reader import Reader, Steps
from engine.text.formats.tool_format import NAME, ToolFormat

_BEGIN, _END = "<tool_call>", "</tool_call>"


def _read(reader: Reader) -> Steps[None]:
    while (yield from reader.pass_until((_BEGIN,), reader.content)):
        yield from reader.attempt(_read_tagged(reader))


def _read_tagged(reader: Reader) -> Steps[None]:
    yield from reader.expect(_BEGIN)
    yield from read_call(reader)
    yield from reader.skip_space()
    yield from reader.accept(_END)


HERMES = ToolFormat(
    name="hermes",
    read=_read,
    markers=(_BEGIN, _END),
    begin=f'{_BEGIN}\n{{"name": "{NAME}", "arguments": ',
    end=f"}}\n{_END}",
    between="\n",
    openings=(_BEGIN,),
)
