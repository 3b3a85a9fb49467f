"""Calls written in JSON: {"name": "f", "arguments": {...}}, and arguments alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from engine.text.formats.reader import Malformed, Reader, Steps

_ARGUMENT_KEYS = ("arguments", "parameters")
_KEYS = ("name", *_ARGUMENT_KEYS, "type", "id")
_STRUCTURE = re.compile(r'["{}\[\]]')
_STRING_END = re.compile(r'["\\]')
_SCALAR = re.compile(r"[^\s,\]}]*")
_CLOSING = {"{": "}", "[": "]"}


def read_call(reader: Reader) -> Steps[None]:
    """One object with the name of a tool and arguments, in any order, perhaps a type and an id.

    Arguments are given out as they come if the name came before them.
    Raises: `Malformed`, at the first thing that is wrong: an answer in JSON is not held up.
    """
    name = arguments = None
    is_started = is_closed = False
    yield from _expect_after_space(reader, "{")
    while True:
        key = yield from _read_string(reader)
        if key not in _KEYS:
            raise Malformed
        yield from _expect_after_space(reader, ":")
        first = yield from reader.skip_space()
        if key == "name" and name is None:
            name = yield from _read_string(reader)
            reader.name_call(name)
        elif key in _ARGUMENT_KEYS and arguments is None:
            if name is not None and first == "{":
                reader.start_call()
                is_started = True
                arguments = yield from _read_value(reader, reader.arguments)
                _parse_arguments(arguments)
            else:
                arguments = yield from _read_value(reader)
        else:
            yield from _read_value(reader)
        if (yield from reader.skip_space()) == "":
            break  # the text may end before the last brace
        if not (yield from reader.accept(",")):
            yield from reader.expect("}")
            is_closed = True
            break
    if name is None or (arguments is None and not is_closed):
        raise Malformed
    if not is_started:
        text = _unwrapped(arguments)
        reader.start_call()
        reader.arguments(text)
    reader.end_call()


def read_arguments(reader: Reader, name: str) -> Steps[None]:
    """An object with the arguments of `name`. Raises: `Malformed`."""
    reader.name_call(name)
    if (yield from reader.skip_space()) != "{":
        raise Malformed
    reader.start_call()
    _parse_arguments((yield from _read_value(reader, reader.arguments)))
    reader.end_call()


def _unwrapped(arguments: str | None) -> str:
    """The object that is meant by null, by nothing, and by a string of JSON."""
    if arguments is None or arguments == "null":
        return "{}"
    if arguments.startswith('"'):
        arguments = _parse(arguments)
    _parse_arguments(arguments)
    return arguments


def _parse_arguments(text: str) -> None:
    if not isinstance(_parse(text), dict):
        raise Malformed


def _parse(text: str) -> object:
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise Malformed from None


def _refuse(_name: str) -> None:
    raise ValueError


def _expect_after_space(reader: Reader, literal: str) -> Steps[None]:
    yield from reader.skip_space()
    yield from reader.expect(literal)


def _read_string(reader: Reader) -> Steps[str]:
    if (yield from reader.skip_space()) != '"':
        raise Malformed
    value = _parse((yield from _read_value(reader)))
    assert isinstance(value, str)
    return value


def _read_value(reader: Reader, emit: Callable[[str], object] = lambda text: None) -> Steps[str]:
    """The text of one JSON value, given to `emit` as it comes. What is inside is checked by its reader.

    Raises: `Malformed` if brackets do not match, or the text ends before the value does.
    """
    pieces: list[str] = []

    def take(num_chars: int) -> None:
        pieces.append(reader.take(num_chars))
        emit(pieces[-1])

    first = yield from reader.skip_space()
    if first not in ('"', "{", "["):
        yield from _take_scalar(reader, take)
        return "".join(pieces)
    open_brackets: list[str] = []
    in_string = False
    at = 0
    while True:
        pattern = _STRING_END if in_string else _STRUCTURE
        found = pattern.search(reader.text, at)
        if found is None or (found[0] == "\\" and found.end() == len(reader.text)):
            # A lone backslash waits for the character that it escapes.
            take(len(reader.text) if found is None else found.start())
            at = 0
            if reader.is_complete:
                raise Malformed
            yield
            continue
        at, char = found.end(), found[0]
        if char == "\\":
            at += 1
        elif char == '"':
            in_string = not in_string
        elif char in _CLOSING:
            open_brackets.append(_CLOSING[char])
        elif not open_brackets or open_brackets.pop() != char:
            take(found.start())  # as if it had come in smaller pieces
            raise Malformed
        if not open_brackets and not in_string:
            take(at)
            return "".join(pieces)


def _take_scalar(reader: Reader, take: Callable[[int], None]) -> Steps[None]:
    while True:
        end = _SCALAR.match(reader.text).end()
        is_ended = end < len(reader.text) or reader.is_complete
        take(end)
        if is_ended:
            return
        yield
