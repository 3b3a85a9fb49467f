"""[TOOL_CALLS], in two forms: a JSON list of calls, and since 2025 NAME[ARGS]{…} after each marker.

Source: https://docs.mistral.ai/capabilities/function_calling/; the tokenizers in mistral-common.
"""

from __future__ import annotations

import dataclasses

from engine.text.formats.json_calls import read_arguments, read_call
from engine.text.formats.reader import Reader, Steps
from engine.text.formats.tool_format import NAME, ToolFormat

_CALLS, _ID, _ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"


def _read(reader: Reader) -> Steps[None]:
    while (yield from reader.pass_until((_CALLS,), reader.content)):
        yield from reader.attempt(_read_marked(reader))


def _read_marked(reader: Reader) -> Steps[None]:
    yield from reader.expect(_CALLS)
    if (yield from reader.skip_space()) == "[":
        yield from _read_list(reader)
    else:
        yield from _read_named(reader)


def _read_list(reader: Reader) -> Steps[None]:
    yield from reader.expect("[")
    yield from read_call(reader)
    while (yield from reader.skip_space()) == ",":
        yield from reader.expect(",")
        yield from read_call(reader)
    yield from reader.accept("]")


def _read_named(reader: Reader) -> Steps[None]:
    """The id that some models write between name and arguments is theirs alone, and left out."""
    name, marker = yield from reader.take_until((_ID, _ARGUMENTS))
    if marker == _ID:
        yield from reader.take_until((_ARGUMENTS,))
    yield from read_arguments(reader, name.strip())


MISTRAL = ToolFormat(
    name="mistral",
    read=_read,
    markers=(_CALLS, _ID, _ARGUMENTS),
    begin=f"{_CALLS}{NAME}{_ARGUMENTS}",
    end="",
    openings=(_CALLS,),
)

MISTRAL_LIST = dataclasses.replace(
    MISTRAL,
    begin=f'{{"name": "{NAME}", "arguments": ',
    end="}",
    before=f"{_CALLS}[",
    between=", ",
    after="]",
)
