"""{"name": …, "parameters": …}, perhaps behind <|python_tag|>: Llama 3.1 to 3.3.

Nothing marks such a call but its own text. An object at the very beginning of the answer, or behind
the tag, may be written in any way; later in the answer it must begin exactly as the model was taught.

Source: https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1/
"""

from __future__ import annotations

from engine.text.formats.json_calls import read_call
from engine.text.formats.reader import Reader, Steps
from engine.text.formats.tool_format import NAME, ToolFormat

_TAG = "<|python_tag|>"
_OPENING = f'{{"name": "{NAME}", "parameters": '


def _read(reader: Reader) -> Steps[None]:
    if (yield from reader.starts_with("{", after_space=True)):
        yield from reader.attempt(_read_calls(reader))
    markers = (_TAG, *(_OPENING.replace(NAME, name) for name in sorted(reader.tool_names)))
    while (yield from reader.pass_until(markers, reader.content)):
        yield from reader.attempt(_read_calls(reader))


def _read_calls(reader: Reader) -> Steps[None]:
    """Calls are parted by semicolons."""
    yield from reader.accept(_TAG)
    yield from read_call(reader)
    while (yield from reader.skip_space()) == ";":
        yield from reader.expect(";")
        yield from read_call(reader)


LLAMA3 = ToolFormat(
    name="llama3",
    read=_read,
    markers=(_TAG,),
    begin=_OPENING,
    end="}",
    between="; ",
    openings=(_OPENING,),
)
