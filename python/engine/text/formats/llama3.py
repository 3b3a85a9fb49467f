"""{"name": …, "parameters": …}, perhaps behind <|python_tag|>: Llama 3.1 to 3.3.

Nothing marks such a call but its own text, so it must begin exactly as the model was taught, or with the
type that such models like to put first. Each way costs the constraint of many tools as much again to compile.

Source: https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1/
"""

from __future__ import annotations

from engine.text.formats.json_calls import read_call
from engine.text.formats.reader import Malformed, Reader, Steps
from engine.text.formats.tool_format import NAME, ToolFormat

_TAG = "<|python_tag|>"
_OPENING = f'{{"name": "{NAME}", "parameters": '


def _read(reader: Reader) -> Steps[None]:
    openings = LLAMA3.named_openings(reader.tool_names)
    while (yield from reader.pass_until(openings, reader.content)):
        yield from reader.attempt(_read_calls(reader, openings))


def _read_calls(reader: Reader, openings: list[str]) -> Steps[None]:
    """Calls are parted by semicolons."""
    yield from reader.accept(_TAG)
    yield from read_call(reader)
    while (yield from reader.skip_space()) == ";":
        yield from reader.expect(";")
        yield from reader.skip_space()
        if not (yield from reader.starts_with_any(openings)):
            raise Malformed
        yield from read_call(reader)


LLAMA3 = ToolFormat(
    name="llama3",
    read=_read,
    markers=(_TAG,),
    begin=_OPENING,
    end="}",
    between="; ",
    openings=(
        _OPENING,
        f'{{"type": "function", "name": "{NAME}", "parameters": ',
        _TAG,
    ),
)
