"""What messages an answer of gpt-oss has, and in which order: a structural tag over all of it.

The model writes everything in messages that begin alike. So wherever something holds for a part of them
(the arguments of calls, the answer itself, how long the thoughts are), the tag covers them all: thoughts,
any number of messages of them, and then a call, or the answer, which nothing follows.
"""

from __future__ import annotations

import msgspec

from engine.sampling.constraint import Constraint
from engine.server.tag_formats import Format, answer_format, sequence, text_format
from engine.text.formats.harmony import (
    ANSWER_OPENING,
    END,
    MARKERS,
    REMARK_OPENING,
    THOUGHTS_OPENING,
    TO_NEXT,
)


def in_messages(calls: Format | None, answer: Constraint | None, *, may_answer: bool = True) -> Format:
    """The format of an answer. Without calls it is in its own message; without `may_answer` it is calls."""
    last = [] if calls is None else [calls]
    if may_answer:
        text = _free_text() if answer is None else answer_format(answer)
        last.append(sequence(text_format(ANSWER_OPENING), text))
    # A remark is shown as part of the answer, which must be free then.
    openings = [THOUGHTS_OPENING, REMARK_OPENING] if may_answer and answer is None else [THOUGHTS_OPENING]
    before = [
        {"type": "tag", "begin": opening, "content": _free_text(but_for=END), "end": END}
        for opening in openings
    ]
    ended = sequence({"type": "or", "elements": before}, text_format(TO_NEXT))
    return sequence({"type": "star", "content": ended}, {"type": "or", "elements": last})


def answer_in_messages(answer: Constraint | None, param: str) -> Constraint:
    """The constraint on an answer without calls; `answer` is that on its own message.

    Raises: `InvalidRequest`.
    """
    tag = {"type": "structural_tag", "format": in_messages(None, answer)}
    name = param if answer is None else answer.param
    return Constraint("structural_tag", msgspec.json.encode(tag).decode(), param=name)


def _free_text(but_for: str = "") -> Format:
    """Text without marks; one that ends it is none of its own."""
    return {"type": "any_text", "excludes": [marker for marker in MARKERS if marker != but_for]}
