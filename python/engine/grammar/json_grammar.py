"""From a JSON schema to a grammar that is right to the last character, and quick to compile.

The compiler's own grammar is taken as text, and three things in it are changed. Patterns go through
the converter for regular expressions: the way that the compiler has for them within JSON takes
`( [0-9]{1,2})?` for `( ?[0-9]{1,2})?`, and lets quotes through. Strings of a bounded length may not hold
control characters, which JSON does not allow. And where bounds are large they are counted while matching:
masks for every single character that may be left take the compiler seconds with a vocabulary of 100,000
tokens, against milliseconds.
"""

from __future__ import annotations

import json
import re
from typing import Any

from engine.grammar.grammar_text import LEXEME, spelled_out, within_json_string, without_surrogates
from engine.grammar.schema_keywords import enforceable

MAX_WHITESPACE = 20
"""Between two elements of JSON where whitespace is free: without a bound weak models never end it."""

MAX_PREPARED_MASKS = 8_000_000
"""Characters times tokens for which masks are prepared: about a second of compiling."""

_COMPACT = [",", ":"]
_COMPILER_CHARACTER = r"^\"\\\r\n"
_JSON_CHARACTER = r"[^\"\\\0-\x1f]"
_JSON_CHARACTER_IN_REGEX = (
    r"([\\x20\\x21\\x23-\\x5b\\x5d-\\x7f]|[\\x80-\\u07ff]|[\\u0800-\\u0fff]|[\\u1000-\\ud7ff]|[\\ue000-\\uffff]"
    r"|[\\u{10000}-\\u{3ffff}]|[\\u{40000}-\\u{fffff}]|[\\u{100000}-\\u{10ffff}])"
)
"""By the first byte in UTF-8: where a class spans several the compiler takes overlong forms, too."""

_MAX_AUTOMATON = 128
"""Characters up to which the compiler makes one automaton of a string, whose masks are the quickest."""

_CHARACTER_RULE = re.compile(r"^(\S+) ::= \(\(\[" + re.escape(_COMPILER_CHARACTER) + r"\]\)\)$", re.MULTILINE)


def compile_schema(bindings: Any, compiler: Any, schema: Any, vocab_size: int, free_whitespace: bool) -> Any:
    """The compiled grammar of a schema.

    Raises: `GrammarError` when it is not enforceable, `RuntimeError` when the compiler refuses it.
    """
    schema, patterns = enforceable(schema)
    separators = None if free_whitespace else _COMPACT
    most = MAX_WHITESPACE if free_whitespace else None
    grammar = bindings.Grammar.from_json_schema(
        json.dumps(schema), free_whitespace, None, separators, True, most, False, False
    )
    text = _with_patterns(bindings, grammar.to_string(), patterns)
    text = without_surrogates(_with_bounds(text, vocab_size))
    return compiler.compile_grammar_from_strings(text, "root")


def _with_patterns(bindings: Any, text: str, patterns: list[str]) -> str:
    """Put the rules of the patterns where the compiler has its own; the schema has their numbers."""
    rules = [
        within_json_string(
            bindings.Grammar.from_regex(spelled_out(pattern), False).to_string(), f"pattern_{number}_"
        )
        for number, pattern in enumerate(patterns)
    ]
    text = LEXEME.sub(lambda m: m[0] if m["regex"] is None else f"pattern_{int(m['regex'])}_root", text)
    return "\n".join([text, *rules])


def _with_bounds(text: str, vocab_size: int) -> str:
    """Give strings of a bounded length their proper characters, and count large bounds."""
    characters = set(_CHARACTER_RULE.findall(text))
    bounded = [match for match in LEXEME.finditer(text) if match["repeated"] in characters]
    num_prepared = sum(max(int(match["least"]), int(match["most"])) for match in bounded)
    counts = num_prepared * vocab_size > MAX_PREPARED_MASKS
    rules: list[str] = []

    def change(match: re.Match[str]) -> str:
        if match["characters"] == _COMPILER_CHARACTER:
            return _JSON_CHARACTER
        if match["repeated"] not in characters or match["most"] == "-1":
            return match[0]
        least, most = int(match["least"]), int(match["most"])
        name = f"bounded_{len(rules)}"
        if most <= _MAX_AUTOMATON and not counts:
            rules.append(f'{name} ::= Regex("{_JSON_CHARACTER_IN_REGEX}{{{least},{most}}}")')
            return name
        rules.append(f"{name}[max_chars={most - least}] ::= {_JSON_CHARACTER}*")
        return f"{match['repeated']}{{{least}, {least}}} {name}" if least else name

    return "\n".join([LEXEME.sub(change, text), *rules, ""])
