"""Escapes for half of a character, as UTF-16 knows them: no text holds what they stand for."""

from __future__ import annotations

import re

from engine.grammar.errors import GrammarError

_HALF = r"[dD][89a-fA-F][\da-fA-F]{2}"
_ESCAPE = re.compile(
    rf"(?P<pair>\\u[dD][89abAB][\da-fA-F]{{2}}\\u[dD][c-fC-F][\da-fA-F]{{2}})"
    rf"|(?P<half>\\(?:u{_HALF}|u\{{0*{_HALF}\}}|U0000{_HALF}))|\\.",
    re.DOTALL,
)


def check_whole_characters(text: str, place: str = "", *, in_pairs: bool = False) -> None:
    """Raises: `GrammarError` with the position of such an escape; `place` is put behind it.

    `in_pairs`: two of them make a character, as in JSON.
    """
    for found in _ESCAPE.finditer(text):
        if found["half"] or (found["pair"] and not in_pairs):
            raise GrammarError(
                f"holds half of a character: {found[0][:12]} at position {found.start()}{place}"
            )
