"""How often a regular expression may repeat something."""

from __future__ import annotations

import re

from engine.grammar.errors import GrammarError

MAX_REPETITIONS = 2**16
_PIECE = re.compile(r"\\.|\[(?:[^\]\\]|\\.)*\]|\{(\d+)(?:,(\d*))?\}|.", re.DOTALL)


def check_regex(regex: str, place: str = "") -> None:
    """Raises: `GrammarError` with the position of a repetition that is too large, inner ones included."""
    inner = [1]  # the largest repetition in each open group
    closed = 1  # that of what has just been closed, or of a single character
    for piece in _PIECE.finditer(regex):
        if piece[1] is not None:
            bound = max(int(number[:10]) for number in piece.groups() if number)
            closed *= bound
            if closed > MAX_REPETITIONS:
                where = f"{piece[0][:40]} at position {piece.start()}{place}"
                raise GrammarError(f"repeats more than {MAX_REPETITIONS} times: {where}")
            inner[-1] = max(inner[-1], closed)
        elif piece[0] == "(":
            inner.append(1)
        elif piece[0] == ")" and len(inner) > 1:
            closed = inner.pop()
            inner[-1] = max(inner[-1], closed)
        else:
            closed = 1
