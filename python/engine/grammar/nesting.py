"""Where JSON is nested most, for those that go too deep."""

from __future__ import annotations

import re

_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"?|(?P<open>[\[{])|(?P<close>[\]}])', re.DOTALL)


def deepest_place(text: str) -> tuple[int, str]:
    """How deep JSON is, that may be no whole document, and what to say of that."""
    depth = most = at = 0
    for bracket in _BRACKET.finditer(text):
        if bracket["open"]:
            depth += 1
            if depth > most:
                most, at = depth, bracket.start()
        elif bracket["close"]:
            depth -= 1
    return most, f"{most} levels at character {at}"
