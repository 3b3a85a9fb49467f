"""Changes to a grammar while it is text: the GBNF that xgrammar prints and reads."""

from __future__ import annotations

import re
from collections.abc import Iterator

from engine.grammar.errors import GrammarError

LEXEME = re.compile(
    r'Regex\("(?P<regex>(?:[^"\\]|\\.)*)", json_string=true\)'
    r'|"(?P<literal>(?:[^"\\]|\\.)*)"'
    r"|\[(?P<characters>(?:[^\]\\]|\\.)*)\]"
    r"|(?P<repeated>[A-Za-z_][\w.-]*)\{(?P<least>\d+), (?P<most>-?\d+)\}"
    r"|(?P<name>[A-Za-z_][\w.-]*)"
)
"""What matters of a grammar, in the order in which it has to be looked for."""

Ranges = list[tuple[int, int]]

_LAST = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)
"""No characters, but halves of them in another encoding; the compiler takes them for characters."""

_ESCAPED: Ranges = [(0, 0x1F), (0x22, 0x22), (0x5C, 0x5C)]
"""Characters that a JSON string does not hold as they are. Source: RFC 8259, section 7."""

_ESCAPE = re.compile(r"\\(?:x(..)|u(....)|U(........)|(.))|(.)", re.DOTALL)
_NAMED = {"n": 0x0A, "r": 0x0D, "t": 0x09, "f": 0x0C, "v": 0x0B, "0": 0, "a": 7, "b": 8, "e": 0x1B}


def within_json_string(text: str, prefix: str) -> str:
    """A grammar for text, as rules for the same text within a JSON string; names get a prefix.

    Characters that JSON escapes are taken out. Raises: `GrammarError` if it cannot do without them.
    """

    def change(match: re.Match[str]) -> str:
        if match["literal"] is not None:
            for code in _codes(match["literal"]):
                if any(first <= code <= last for first, last in _ESCAPED):
                    raise GrammarError(f"has a pattern with {chr(code)!r}, which JSON has to escape")
            return match[0]
        if match["characters"] is not None:
            ranges = _without(_ranges(match["characters"]), [*_ESCAPED, _SURROGATES])
            if not ranges:
                raise GrammarError("has a pattern with characters that JSON has to escape, and no others")
            return _class_of(ranges)
        return prefix + match[0]

    return LEXEME.sub(change, text)


def without_surrogates(text: str) -> str:
    """A grammar whose answers are text: classes of characters hold no surrogates."""

    def change(match: re.Match[str]) -> str:
        if match["characters"] is None:
            return match[0]
        ranges = _ranges(match["characters"])
        if not any(first <= _SURROGATES[1] and last >= _SURROGATES[0] for first, last in ranges):
            return match[0]
        return _class_of(_without(ranges, [_SURROGATES]))

    return LEXEME.sub(change, text)


def spelled_out(regex: str) -> str:
    """A regular expression without what the compiler takes for something else.

    Its dot takes line ends too, and an escaped caret at the start of a class inverts that.
    """
    return "".join(_spelled_out(piece) for piece in _pieces(regex))


def place_before_spelling(regex: str, position: int) -> int:
    """Where in an expression that is which is at a position of it `spelled_out`."""
    start = 0
    for piece in _pieces(regex):
        spelled = len(_spelled_out(piece))
        if position < spelled:
            return start + (position if spelled == len(piece) else 0)
        position -= spelled
        start += len(piece)
    return start


def _pieces(regex: str) -> list[str]:
    return re.findall(r"\\.|\[\^?(?:\\.|[^\]\\])*\]?|.", regex, flags=re.DOTALL)


def _spelled_out(piece: str) -> str:
    if piece == ".":
        return r"[^\n\r]"
    if piece == r"[\^]":
        return r"\^"
    if piece.startswith(r"[\^") and piece.endswith("]"):
        return f"[{piece[3:-1]}\\^]"
    return piece


def _codes(text: str) -> Iterator[int]:
    """Code points of a literal."""
    for match in _ESCAPE.finditer(text):
        hexadecimal = match[1] or match[2] or match[3]
        if hexadecimal:
            yield int(hexadecimal, 16)
        else:
            yield _NAMED.get(match[4], ord(match[4])) if match[4] else ord(match[5])


def _ranges(text: str) -> Ranges:
    """Code points of a class, in order; those that it leaves out if it begins with a caret."""
    is_negated = text.startswith("^")
    tokens = [match[0] for match in _ESCAPE.finditer(text[is_negated:])]
    ranges: Ranges = []
    while tokens:
        first = last = next(_codes(tokens.pop(0)))
        if len(tokens) > 1 and tokens[0] == "-":
            last = next(_codes(tokens[1]))
            del tokens[:2]
        ranges.append((first, last))
    return _complement(ranges) if is_negated else ranges


def _without(ranges: Ranges, taken_out: Ranges) -> Ranges:
    return _complement([*_complement(ranges), *taken_out])


def _class_of(ranges: Ranges) -> str:
    return "[" + "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges) + "]"


def _complement(ranges: Ranges) -> Ranges:
    gaps, begin = [], 0
    for first, last in sorted(ranges):
        if first > begin:
            gaps.append((begin, first - 1))
        begin = max(begin, last + 1)
    if begin <= _LAST:
        gaps.append((begin, _LAST))
    return gaps
