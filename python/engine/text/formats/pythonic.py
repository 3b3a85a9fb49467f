"""[f(a=1, b="x"), g()]: Llama 4 (between <|python_start|> and <|python_end|>), Llama 3.2, ToolACE, Olmo 3.

Arguments become JSON when the call is complete, or cut off: literals of Python, and those of JSON.

Source: https://www.llama.com/docs/model-cards-and-prompt-formats/llama4/
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator

from engine.text.formats.reader import Malformed, Reader, Steps
from engine.text.formats.tool_format import NAME, ToolFormat

_START, _END = "<|python_start|>", "<|python_end|>"
_STRUCTURE = re.compile(r"""["'()\[\]{}]""")
_STRING_END = {'"': re.compile(r'["\\]'), "'": re.compile(r"['\\]")}
_CLOSING = {"(": ")", "[": "]", "{": "}"}


def _read(reader: Reader) -> Steps[None]:
    openings = PYTHONIC.named_openings(reader.tool_names)
    while (yield from reader.pass_until(openings, reader.content)):
        yield from reader.attempt(_read_calls(reader))


def _read_calls(reader: Reader) -> Steps[None]:
    is_tagged = yield from reader.accept(_START)
    yield from reader.skip_space()
    yield from reader.expect("[")
    yield from _read_one(reader)
    while (yield from reader.skip_space()) == ",":
        yield from reader.expect(",")
        yield from _read_one(reader)
    yield from reader.expect("]")
    if is_tagged:
        yield from reader.skip_space()
        yield from reader.accept(_END)


def _read_one(reader: Reader) -> Steps[None]:
    yield from reader.skip_space()
    name, _ = yield from reader.take_until(("(",))
    reader.name_call(name)
    reader.start_call()
    pieces: list[str] = []
    try:
        yield from _read_parentheses(reader, pieces)
    except Malformed:
        if reader.is_complete:
            reader.arguments(beginning_of_json("".join(pieces)))
        raise
    reader.arguments(to_json("".join(pieces)[:-1]))
    reader.end_call()


def _read_parentheses(reader: Reader, pieces: list[str]) -> Steps[None]:
    """Everything up to the parenthesis that closes the one just taken, which is taken too."""
    open_brackets = [")"]
    quote = ""
    at = 0
    while True:
        found = (_STRING_END[quote] if quote else _STRUCTURE).search(reader.text, at)
        if found is None or (found[0] == "\\" and found.end() == len(reader.text)):
            # A lone backslash waits for the character that it escapes.
            pieces.append(reader.take(len(reader.text) if found is None else found.start()))
            at = 0
            if reader.is_complete:
                raise Malformed
            yield
            continue
        at, char = found.end(), found[0]
        if char == "\\":
            at += 1
        elif char == quote:
            quote = ""
        elif char in _STRING_END:
            quote = char
        elif char in _CLOSING:
            open_brackets.append(_CLOSING[char])
        elif open_brackets.pop() != char:
            reader.take(found.start())  # as if it had come in smaller pieces
            raise Malformed
        if not open_brackets:
            pieces.append(reader.take(at))
            return


ARGUMENT_NAME = re.compile(r"[^\W\d][\w-]*")
_TOKEN = re.compile(
    rf"""\s*(?:
    (?P<string>"(?:[^"\\]|\\.)*" | '(?:[^'\\]|\\.)*')
    | (?P<number>[-+]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)
    | (?P<key>{ARGUMENT_NAME.pattern})\s*=(?!=)
    | (?P<word>[^\W\d]\w*)
    | (?P<mark>[\[\](){{}},:])
    )""",
    re.VERBOSE | re.DOTALL,
)
_UNFINISHED = re.compile(r"[\w.+-]*\Z")
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_MARKS = {"(": "[", ")": "]"}
_ESCAPE = re.compile(
    r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-7]{1,3})|(.))", re.DOTALL
)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0", "\n": ""}


def to_json(arguments: str) -> str:
    """The JSON object that keyword arguments, as they stand between the parentheses, mean.

    Raises: `Malformed` for anything but keywords with literals.
    """
    text = "{" + "".join(_json_tokens(arguments.strip())) + "}"
    try:
        if not isinstance(json.loads(text), dict):
            raise Malformed
    except (ValueError, RecursionError):
        raise Malformed from None
    return text


def beginning_of_json(arguments: str) -> str:
    """The JSON for as many values as are certain in arguments that were cut off."""
    tokens = ["{"]
    with contextlib.suppress(Malformed):
        tokens.extend(_json_tokens(_UNFINISHED.sub("", arguments)))
    return "".join(tokens)


def _json_tokens(text: str) -> Iterator[str]:
    """Tokens of JSON for tokens of Python; whether they make sense in this order shows when they are read."""
    at, comma = 0, ""
    depth = 0
    while at < len(text):
        token = _TOKEN.match(text, at)
        if token is None:
            raise Malformed
        at = token.end()
        mark = token["mark"]
        if mark == ",":
            if comma:
                raise Malformed
            comma = ", "
            continue
        if comma and mark not in (")", "]", "}"):  # Python allows a comma before a closing bracket
            yield comma
        comma = ""
        depth += (mark in _CLOSING) - (mark in (")", "]", "}"))
        if token["key"] is not None:
            if depth:
                raise Malformed
            yield f"{json.dumps(token['key'])}: "
        elif mark == ":":
            yield ": "
        elif mark is not None:
            yield _MARKS.get(mark, mark)
        else:
            yield _literal(token)


def _literal(token: re.Match[str]) -> str:
    if token["string"] is not None:
        value = _ESCAPE.sub(_unescape, token["string"][1:-1])
        has_surrogates = any("\ud800" <= char <= "\udfff" for char in value)
        return json.dumps(value, ensure_ascii=has_surrogates)
    if token["word"] is not None:
        if token["word"] not in _WORDS:
            raise Malformed
        return _WORDS[token["word"]]
    number = token["number"].replace("_", "")
    try:
        return json.dumps(int(number) if number.lstrip("+-").isdigit() else float(number), allow_nan=False)
    except ValueError:
        raise Malformed from None


def _unescape(escape: re.Match[str]) -> str:
    for digits, base in zip(escape.groups()[:4], (16, 16, 16, 8), strict=True):
        if digits is not None:
            try:
                return chr(int(digits, base))
            except (ValueError, OverflowError):
                raise Malformed from None
    # An escape that means nothing stays as it is written, as in Python.
    return _ESCAPED.get(escape[5], escape[5] if escape[5] in "\\'\"" else escape[0])


PYTHONIC = ToolFormat(
    name="pythonic",
    read=_read,
    markers=(_START, _END),
    begin=f"{NAME}(",
    end=")",
    before="[",
    between=", ",
    after="]",
    openings=(f"[{NAME}(", _START),
    closing=_END,
    has_python_arguments=True,
)
