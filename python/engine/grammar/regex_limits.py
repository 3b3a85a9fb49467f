"""What of a regular expression the compiler would refuse without its place, or not in time."""

from __future__ import annotations

import re

from engine.grammar.errors import GrammarError, Unenforceable
from engine.grammar.half_characters import check_whole_characters

MAX_REPETITIONS = 2**16
MAX_GROUPS = 500
"""Groups within each other."""

PIECE = re.compile(r"\\.|\[(?:[^\]\\]|\\.)*\]?|\{(\d+)(?:,(\d*))?\}|.", re.DOTALL)
_UNSUPPORTED = re.compile(r"\(\?(?!:|<[^=!])<?.|\\[bB1-9kpP]", re.DOTALL)
"""Look-around, flags and other special groups, word boundaries, back references, classes by property."""
_REPETITION = re.compile(r"[*+?]|\{\d")
_RANGE = re.compile(r"\\.|([^\\])-([^\\])", re.DOTALL)
"""Of a class of characters, both ends of which are plain."""


def check_regex(regex: str, place: str = "") -> None:
    """Raises: `GrammarError` with the position of a repetition that is too large, inner ones included, of
    bounds or a range of characters the wrong way round, of too many groups in one another, of a repetition
    of nothing, of half of a character, or of a bracket that other dialects read otherwise; `Unenforceable`
    with that of what no grammar can hold."""
    check_whole_characters(regex, place)
    inner = [1]  # the largest repetition in each open group
    closed = 1  # that of what has just been closed, or of a single character
    before = "|"
    for piece in PIECE.finditer(regex):
        if (found := _UNSUPPORTED.match(regex, piece.start())) is not None:
            raise Unenforceable(f"has what is not supported: {_where(found, place)}")
        is_group = before == "(" and piece[0] == "?"
        if before in ("|", "(") and _REPETITION.match(piece[0]) and not is_group:
            raise GrammarError(f"repeats nothing: {_where(piece, place)}")
        before = piece[0]
        if piece[1] is not None:
            if piece[2] and int(piece[1][:10]) > int(piece[2][:10]):
                raise GrammarError(f"has bounds the wrong way round: {_where(piece, place)}")
            bound = max(int(number[:10]) for number in piece.groups() if number)
            closed *= bound
            if closed > MAX_REPETITIONS:
                raise GrammarError(f"repeats more than {MAX_REPETITIONS} times: {_where(piece, place)}")
            inner[-1] = max(inner[-1], closed)
        elif piece[0] == "(":
            inner.append(1)
            if len(inner) - 1 > MAX_GROUPS:
                raise GrammarError(f"has groups in one another, over {MAX_GROUPS}: {_where(piece, place)}")
        elif piece[0] == ")" and len(inner) > 1:
            closed = inner.pop()
            inner[-1] = max(inner[-1], closed)
        else:
            closed = 1
            if piece[0] == "[^]":
                raise GrammarError(f"begins a class with ], which has to be escaped: {_where(piece, place)}")
            if piece[0].startswith(r"[\^-"):
                raise GrammarError(f"begins a class with a range from a caret: {_where(piece, place)}")
            ranges = _RANGE.finditer(piece[0][1:-1].removeprefix("^"))
            if any(found[1] and found[1] > found[2] for found in ranges):
                raise GrammarError(f"has a range the wrong way round: {_where(piece, place)}")


def _where(piece: re.Match[str], place: str) -> str:
    return f"{piece[0][:40]} at position {piece.start()}{place}"
