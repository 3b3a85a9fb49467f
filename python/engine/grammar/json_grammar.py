"""From a JSON schema to a grammar that is right to the last character, and quick to compile.

The compiler's own grammar is taken as text, and five things in it are changed. Elements of JSON that no
schema says anything about are parted like all others. Names of further properties are no declared ones,
spelled with escapes. Patterns go through the converter for regular expressions: the way that the compiler
has for them within JSON takes `( [0-9]{1,2})?` for `( ?[0-9]{1,2})?`, and lets quotes through. Strings of a
bounded length may not hold control characters, which JSON does not allow. And where bounds are large they
are counted while matching: masks for every single character that may be left take the compiler seconds with
a vocabulary of 100,000 tokens, against milliseconds.
"""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Callable
from typing import Any

from engine.grammar.compiler_voice import heard
from engine.grammar.errors import GrammarError, Unenforceable
from engine.grammar.grammar_text import LEXEME, within_json_string, without_surrogates
from engine.grammar.regex_grammar import regex_grammar
from engine.grammar.schema_keywords import Pattern, enforceable, refusal
from engine.grammar.string_masks import ANY_STRING, rule_name

MAX_WHITESPACE = 20
"""Between two elements of JSON where whitespace is free: without a bound weak models never end it."""

MAX_PREPARED_MASKS = 8_000_000
"""Characters times tokens for which masks are prepared: about a second of compiling."""

COMPACT = (",", ":")
SPACED = (", ", ": ")
"""As chat templates write JSON."""
_ANY_ELEMENTS = re.compile(r'^(basic_(?:array_items|object_properties) ::= \(\()", "', re.MULTILINE)
"""Further elements of JSON that no schema says anything about: the compiler always puts a space there."""

_ESCAPE_IN_NAME = re.compile(
    r'^(\S+_addl_key(?:_\d+)? ::= .*) \| \("\\\\" basic_escape basic_string_sub\)', re.MULTILINE
)
"""In a name that is none of the declared ones, as far as it begins like one of these."""

_ANY_STRING = re.compile(rf"^({ANY_STRING}) ::=", re.MULTILINE)

_COMPILER_CHARACTER = r"^\"\\\r\n"
_JSON_CHARACTER = r"[^\"\\\0-\x1f]"
_JSON_CHARACTER_IN_REGEX = (
    r"([\\x20\\x21\\x23-\\x5b\\x5d-\\x7f]|[\\x80-\\u07ff]|[\\u0800-\\u0fff]|[\\u1000-\\ud7ff]|[\\ue000-\\uffff]"
    r"|[\\u{10000}-\\u{3ffff}]|[\\u{40000}-\\u{fffff}]|[\\u{100000}-\\u{10ffff}])"
)
"""By the first byte in UTF-8: where a class spans several the compiler takes overlong forms, too."""

_MAX_AUTOMATON = 128
"""Characters up to which the compiler makes one automaton of a string, whose masks are the quickest."""

_CLOSING = ' "\\""'
_CHARACTER_RULE = re.compile(r"^(\S+) ::= \(\(\[" + re.escape(_COMPILER_CHARACTER) + r"\]\)\)$", re.MULTILINE)


def whole_schema_text(bindings: Any, schema: Any, vocab_size: int, free_whitespace: bool) -> str:
    """The grammar of an answer that follows a schema.

    Raises: `GrammarError` when it is not enforceable, or the compiler refuses it.
    """
    (text,) = finished([schema_text(bindings, schema, None if free_whitespace else COMPACT)], vocab_size)
    return text


def schema_text(bindings: Any, schema: Any, separators: tuple[str, str] | None) -> str:
    """The grammar of a schema, to be `finished`. `separators` are those of items and of names, None for
    free white space. Raises as `whole_schema_text`."""
    found = enforceable(schema, looks_for_ends=True)
    is_free = separators is None
    most = MAX_WHITESPACE if is_free else None

    def converted() -> str:
        with heard():
            return bindings.Grammar.from_json_schema(
                json.dumps(found.schema), is_free, None, separators, True, most, False, False
            ).to_string()

    try:
        text = _ESCAPE_IN_NAME.sub(r"\1", converted())
    except Unenforceable as error:
        if "oneOf" not in str(error):
            raise
        at = _first_overlap(found.one_ofs, converted)
        what = "is supported only for schemas that provably never match the same"
        raise refusal(at, "oneOf", what) from None
    text = _ANY_STRING.sub(r"\1[temperature=1] ::=", text)
    if separators is not None:
        text = _ANY_ELEMENTS.sub(rf'\1"{separators[0]}"', text)
    return _with_patterns(bindings, text, found.patterns)


def finished(texts: list[str], vocab_size: int) -> list[str]:
    """The grammars of one constraint with their strings as they have to be."""
    num_prepared = sum(_num_bounded_chars(text) for text in texts)
    counts = num_prepared * vocab_size > MAX_PREPARED_MASKS
    return [without_surrogates(_with_bounds(text, counts)) for text in texts]


def _first_overlap(one_ofs: list[tuple[dict[str, Any], str]], converted: Callable[[], str]) -> str:
    """The place of the first of these that the compiler does not take; it takes their schema with none."""

    def warns(count: int) -> bool:
        """Of the first `count`, when in the others more than one schema may match."""
        for i, (schema, _) in enumerate(one_ofs):
            branches = schema.pop("oneOf", None) or schema.pop("anyOf")
            schema["oneOf" if i < count else "anyOf"] = branches
        try:
            converted()
        except Unenforceable:
            return True
        return False

    return one_ofs[bisect.bisect_left(range(1, len(one_ofs)), True, key=warns)][1]


def _with_patterns(bindings: Any, text: str, patterns: list[Pattern]) -> str:
    """Put the rules of the patterns where the compiler has its own; the schema has their numbers."""
    rules = [_rules_of(bindings, pattern, f"pattern_{number}_") for number, pattern in enumerate(patterns)]
    text = LEXEME.sub(lambda m: m[0] if m["regex"] is None else f"pattern_{int(m['regex'])}_root", text)
    return "\n".join([text, *rules])


def _rules_of(bindings: Any, pattern: Pattern, prefix: str) -> str:
    place = f", in the pattern at {pattern.at[:200]}"
    text = regex_grammar(bindings, pattern.regex, place=place)
    try:
        return within_json_string(text, prefix)
    except GrammarError as error:
        raise GrammarError(f"{error}{place}") from None


def _num_bounded_chars(text: str) -> int:
    """Characters of all strings of a bounded length."""
    characters = set(_CHARACTER_RULE.findall(text))
    bounded = [match for match in LEXEME.finditer(text) if match["repeated"] in characters]
    return sum(max(int(match["least"]), int(match["most"])) for match in bounded)


def _with_bounds(text: str, counts: bool) -> str:
    """Give strings of a bounded length their proper characters; `counts`: even short ones are counted."""
    characters = set(_CHARACTER_RULE.findall(text))
    rules: dict[str, str] = {}
    closed: set[str] = set()

    def change(match: re.Match[str]) -> str:
        if match["characters"] == _COMPILER_CHARACTER:
            return _JSON_CHARACTER
        if match["repeated"] not in characters:
            return match[0]
        least, most = int(match["least"]), int(match["most"])
        is_endless = most < 0
        if is_endless and least <= _MAX_AUTOMATON:
            return match[0]
        is_counted = counts or is_endless or most > _MAX_AUTOMATON
        name = f"bounded_{least}_{'' if is_endless else most}"
        if not is_counted:
            rules[name] = f' ::= Regex("{_JSON_CHARACTER_IN_REGEX}{{{least},{most}}}")'
        else:
            num_pieces, num_left = divmod(least, _MAX_AUTOMATON)  # the compiler goes wrong in longer ones
            pieces = ["characters_in_a_row"] * num_pieces
            pieces += [_repeated(match["repeated"], num_left)] if num_left else []
            if num_pieces:
                rules["characters_in_a_row"] = f" ::= {_repeated(match['repeated'], _MAX_AUTOMATON)}"
            bound = "" if is_endless else f"[max_chars={most}]"
            rules[name] = f"{bound} ::= {' '.join([*pieces, _JSON_CHARACTER])}*"
        if is_endless or not match.string.startswith(_CLOSING, match.end()):
            return name
        closed_name = rule_name(least, most, is_counted)
        rules[closed_name] = f"[temperature=1] ::= {name}{_CLOSING}"
        closed.add(closed_name)
        return closed_name

    text = LEXEME.sub(change, text)
    for name in closed:
        text = text.replace(name + _CLOSING, name)
    return "\n".join([text, *(name + rule for name, rule in rules.items()), ""])


def _repeated(rule: str, number: int) -> str:
    return f"{rule}{{{number}, {number}}}"
