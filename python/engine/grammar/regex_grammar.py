"""From a regular expression to a grammar as text; positions in errors are those in the expression."""

from __future__ import annotations

from typing import Any

from engine.grammar.compiler_voice import heard
from engine.grammar.grammar_text import place_before_spelling, spelled_out
from engine.grammar.regex_limits import check_regex


def regex_grammar(bindings: Any, regex: str, keyword_place: str = "", place: str = "") -> str:
    """The grammar of texts that match. Its classes may hold surrogates.

    `keyword_place` and `place` are put behind errors that this and the compiler find. Raises: `GrammarError`.
    """
    check_regex(regex, keyword_place)
    with heard(place, lambda position: place_before_spelling(regex, position)):
        return bindings.Grammar.from_regex(spelled_out(regex), False).to_string()
