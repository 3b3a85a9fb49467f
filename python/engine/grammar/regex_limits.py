"""How often a regular expression may repeat something."""

from __future__ import annotations

import re

from engine.grammar.errors import GrammarError

MAX_REPETITIONS = 2**16
_REPETITION = re.compile(r"\\.|\[(?:[^\]\\]|\\.)*\]|\{(\d+)(?:,(\d*))?\}", re.DOTALL)


def check_regex(regex: str, place: str = "") -> None:
    """Raises: `GrammarError` with the position of a repetition that is too large."""
    for match in _REPETITION.finditer(regex):
        for bound in match.groups():
            if bound and (len(bound) > 9 or int(bound) > MAX_REPETITIONS):
                where = f"{match[0][:40]} at position {match.start()}{place}"
                raise GrammarError(f"repeats more than {MAX_REPETITIONS} times: {where}")
