"""From a constraint to a compiled grammar of xgrammar."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from engine.grammar.bindings import RAW_VOCABULARY
from engine.grammar.compiler_voice import refused
from engine.grammar.errors import GrammarError
from engine.grammar.gbnf_source import enforceable_gbnf
from engine.grammar.grammar_text import without_surrogates
from engine.grammar.half_characters import check_whole_characters
from engine.grammar.json_grammar import whole_schema_text
from engine.grammar.nesting import deepest_place
from engine.grammar.protocol import Prepared
from engine.grammar.regex_grammar import regex_grammar
from engine.grammar.string_masks import ANY_STRING, RULE, BoundsOfRules, StringTables, bounds_of
from engine.grammar.structural_tag import enforceable_tag
from engine.grammar.vocabulary import VocabularyData
from engine.sampling.constraint import Constraint

_WITH_STRINGS = ("json_schema", "json_object", "structural_tag")


def make_tokenizer_info(bindings: Any, data: VocabularyData) -> Any:
    """What the compiler knows of the vocabulary. Stop tokens are chosen by each matcher."""
    return bindings.TokenizerInfo(data.tokens, RAW_VOCABULARY, len(data.tokens), [0], False)


def prepare(bindings: Any, constraint: Constraint, vocab_size: int, free_whitespace: bool) -> Prepared:
    """The constraint as the compiler takes it. Raises: `GrammarError`."""
    try:
        with _said_in_a_line():
            return _prepare(bindings, constraint, vocab_size, free_whitespace)
    except RecursionError:
        raise GrammarError(f"is nested too deeply: {deepest_place(constraint.text)[1]}") from None


def compile_prepared(compiler: Any, grammar: Prepared) -> Any:
    """The compiled grammar. Raises: `GrammarError`."""
    with _said_in_a_line():
        if grammar.is_tag:
            return compiler.compile_structural_tag(grammar.text)
        return compiler.compile_grammar_from_strings(grammar.text, "root")


def strings_of(
    tables: StringTables, handle: Any, constraint: Constraint
) -> tuple[StringTables, BoundsOfRules] | None:
    """What finds the masks within the strings of a compiled grammar, if it has such."""
    if constraint.kind not in _WITH_STRINGS:
        return None
    text = constraint.text
    if "\\" in text:  # which may spell any name with escapes
        text = json.dumps(json.loads(text))
    if RULE in text or ANY_STRING in text:  # somebody else's rule, perhaps
        return None
    bounds = bounds_of(handle)
    return (tables, bounds) if bounds else None


@contextlib.contextmanager
def _said_in_a_line() -> Iterator[None]:
    try:
        yield
    except RecursionError:  # a RuntimeError, too
        raise
    except (RuntimeError, ValueError, TypeError) as error:  # the bindings raise nothing narrower
        raise refused(error) from None


def _prepare(bindings: Any, constraint: Constraint, vocab_size: int, free_whitespace: bool) -> Prepared:
    text = constraint.text
    match constraint.kind:
        case "json_schema":
            text = whole_schema_text(bindings, _parse_json(text), vocab_size, free_whitespace)
        case "json_object":
            text = whole_schema_text(bindings, {"type": "object"}, vocab_size, free_whitespace)
        case "regex":
            text = without_surrogates(regex_grammar(bindings, text))
        case "ebnf":
            text = enforceable_gbnf(bindings, text)
        case "structural_tag":
            tag = enforceable_tag(bindings, _parse_json(text), vocab_size, free_whitespace)
            return Prepared(tag, is_tag=True)
        case "choice":
            text = "root ::= " + " | ".join(map(_quoted, _choices(text)))
    return Prepared(text, is_tag=False)


def _choices(text: str) -> list[str]:
    choices = _parse_json(text)
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) for c in choices):
        raise GrammarError("must be a non-empty array of strings")
    return choices


def _quoted(text: str) -> str:
    """A string of a GBNF grammar."""
    return '"' + "".join(c if c.isalnum() and c.isascii() else f"\\U{ord(c):08x}" for c in text) + '"'


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _parse_json(text: str) -> Any:
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:
        raise GrammarError(f"is not valid JSON: {error}") from None
    check_whole_characters(text, in_pairs=True)
    return value
