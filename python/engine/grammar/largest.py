"""Where a constraint is largest: said of one that takes too much, of which the compiler names no place.

Nothing is compiled for it: what is written is counted, with every repetition as often as its bound says.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from engine.grammar.gbnf_source import MOST, GbnfSource
from engine.grammar.nesting import deepest_place
from engine.grammar.regex_limits import PIECE
from engine.grammar.schema_keywords import ANNOTATIONS

_COUNTS = frozenset(["minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"])
_NAMES_OF_SCHEMAS = frozenset(["properties", "patternProperties", "$defs", "definitions"])


class _Part(NamedTuple):
    size: float
    what: str


def largest_in(kind: str, text: str) -> str:
    """What there is most of in a constraint of this kind, and where: said at the end of a sentence."""
    match kind:
        case "regex":
            return f"largest in it is {_of_regex(text).what}"
        case "ebnf":
            return f"largest in it is {GbnfSource(text).largest().what}"
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return f"it is deepest with {deepest_place(text)[1]}"
    part = _of_choices(value) if kind == "choice" else _of_json(value)
    depth, place = deepest_place(text)
    return f"largest in it is {part.what}" if part.size > depth else f"it is deepest with {place}"


def _of_regex(regex: str) -> _Part:
    """The repetition that stands for most, or the whole where no repetition stands for as much."""
    found = _Part(0, "")
    groups = [0.0]  # elements so far, of each open group
    last = num_plain = 0.0
    was_repetition = False
    for piece in PIECE.finditer(regex):
        text, times = piece[0], 0.0
        if text == "(":
            groups.append(0.0)
        elif text == ")" and len(groups) > 1:
            last = groups.pop() or 1.0
            groups[-1] = min(MOST, groups[-1] + last)
        elif piece[1] is not None:
            times = max(1.0, *(float(number[:10]) for number in piece.groups() if number))
        elif text in ("*", "+"):
            times = 2.0  # without a bound, and more than once
        elif text == "?":
            times = 0.0 if was_repetition else 1.0
        elif text not in ("|", "^", "$"):
            last = 1.0
            groups[-1] += last
            num_plain += 1
        was_repetition = times > 0
        if times > 1:
            groups[-1] = min(MOST, groups[-1] + last * (times - 1))
            last = min(MOST, last * times)
            if last > found.size:
                found = _Part(last, f"{text[:40]} at position {piece.start()}")
    if num_plain > found.size or not found.what:
        return _Part(num_plain, f"the whole of {len(regex)} characters from position 0")
    return found


def _of_choices(value: Any) -> _Part:
    texts = value if isinstance(value, list) else []
    lengths = [len(text) if isinstance(text, str) else 0 for text in texts]
    longest = max(range(len(lengths)), key=lengths.__getitem__, default=0)
    if not lengths or len(lengths) > lengths[longest]:
        return _Part(len(lengths), f"the number of texts, {len(lengths)}")
    return _Part(lengths[longest], f"text {longest}, of {lengths[longest]} characters")


def _of_json(value: Any) -> _Part:
    """The keyword that counts for most by itself, without what is in the schemas within it."""
    found = _Part(0, "")
    waiting = [(value, "#")]
    while waiting:
        node, at = waiting.pop()
        items = enumerate(node) if isinstance(node, list) else node.items() if isinstance(node, dict) else ()
        for key, inner in items:
            if isinstance(node, dict):
                if key in ANNOTATIONS:
                    continue
                size, detail = _own_size(key, inner)
                if size > found.size:
                    found = _Part(size, f"{json.dumps(key[:40])} at {at}{detail}")
            if isinstance(inner, (dict, list)) and key not in ("const", "enum"):
                waiting.append((inner, f"{at}/{key}"[:200]))
    return found


def _own_size(key: str, value: Any) -> _Part:
    """Of a keyword; with what there is to say of its inside."""
    if key in _COUNTS and isinstance(value, int):
        return _Part(value, f", {value}")
    if key in ("pattern", "regex") and isinstance(value, str):
        part = _of_regex(value)
        return _Part(part.size, f": {part.what}")
    if key == "grammar" and isinstance(value, str):
        found = GbnfSource(value).largest()
        return _Part(found.size, f": {found.what}")
    if key in ("const", "enum"):
        size = len(json.dumps(value, ensure_ascii=False))
        return _Part(size, f", {size} characters")
    if isinstance(value, list) or (isinstance(value, dict) and key in _NAMES_OF_SCHEMAS):
        return _Part(len(value), f", {len(value)} of them")
    if isinstance(value, str):
        return _Part(len(value), f", {len(value)} characters")
    return _Part(0, "")
