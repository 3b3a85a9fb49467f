"""From a constraint to a compiled grammar of xgrammar."""

from __future__ import annotations

import json
import re
from typing import Any

from engine.grammar.bindings import RAW_VOCABULARY
from engine.grammar.schema_keywords import check_schema
from engine.grammar.vocabulary import VocabularyData
from engine.sampling.constraint import Constraint

MAX_REPETITIONS = 2**16
MAX_WHITESPACE = 20
"""Between two elements of JSON where whitespace is free: without a bound weak models never end it."""
_COMPACT = [",", ":"]
_PLACE = re.compile(r"^\[\d\d:\d\d:\d\d\] \S+:\d+: ")
_REPETITION = re.compile(r"\{(\d+)(?:,(\d*))?\}")


class GrammarError(Exception):
    """The constraint is at fault; the message goes to the client, after the name of the field."""


def make_tokenizer_info(bindings: Any, data: VocabularyData) -> Any:
    """What the compiler knows of the vocabulary. Stop tokens are chosen by each matcher."""
    return bindings.TokenizerInfo(data.tokens, RAW_VOCABULARY, len(data.tokens), [0], False)


def check_constraint(constraint: Constraint) -> None:
    """Refuse what the compiler would leave out or take for something else. Raises: `GrammarError`."""
    match constraint.kind:
        case "json_schema":
            check_schema(_parse_json(constraint.text))
        case "regex":
            _check_regex(constraint.text)
        case "choice":
            _choices(constraint.text)


def compile_constraint(bindings: Any, compiler: Any, constraint: Constraint, free_whitespace: bool) -> Any:
    """The compiled grammar. Raises: `GrammarError`."""
    try:
        return _compile(bindings, compiler, constraint, free_whitespace)
    except (RuntimeError, ValueError, TypeError) as error:  # the bindings raise nothing narrower
        raise GrammarError(_reason(error)) from None


def _compile(bindings: Any, compiler: Any, constraint: Constraint, free_whitespace: bool) -> Any:
    text = constraint.text
    match constraint.kind:
        case "json_schema" | "json_object":
            if constraint.kind == "json_object":
                text = '{"type":"object"}'
            separators = None if free_whitespace else _COMPACT
            most = MAX_WHITESPACE if free_whitespace else None
            return compiler.compile_json_schema(text, free_whitespace, None, separators, True, most, False)
        case "regex":
            return compiler.compile_regex(text)
        case "structural_tag":
            return compiler.compile_structural_tag(text)
        case "choice":
            text = "root ::= " + " | ".join(map(_quoted, _choices(text)))
    return compiler.compile_grammar_from_strings(text, "root")


def _choices(text: str) -> list[str]:
    choices = _parse_json(text)
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) for c in choices):
        raise GrammarError("must be a non-empty array of strings")
    return choices


def _quoted(text: str) -> str:
    """A string of a GBNF grammar."""
    return '"' + "".join(c if c.isalnum() and c.isascii() else f"\\U{ord(c):08x}" for c in text) + '"'


def _check_regex(text: str) -> None:
    for match in _REPETITION.finditer(text):
        if any(len(bound) > 9 or int(bound) > MAX_REPETITIONS for bound in match.groups() if bound):
            raise GrammarError(
                f"repeats more than {MAX_REPETITIONS} times: {match[0][:40]} at position {match.start()}"
            )


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise GrammarError("is nested too deeply") from None
    except ValueError as error:
        raise GrammarError(f"is not valid JSON: {error}") from None


def _reason(error: Exception) -> str:
    """The library's message without its place in the library's sources, in one line."""
    text = _PLACE.sub("", str(error))
    if "bad_alloc" in text:
        return "needs too much memory to compile"
    return "cannot be compiled: " + " ".join(text.split())[:500]
