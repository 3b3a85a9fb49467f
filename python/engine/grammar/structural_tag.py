"""Structural tags: text with constrained parts, each of which is held to what it would be alone.

The compiler's own way with schemas and expressions inside of tags leaves out keywords it does not know, and
takes patterns for others than they are. So each schema and each expression becomes a grammar here, by the
same rules as a constraint of its own, and whatever is not known is refused.
"""

from __future__ import annotations

import json
from typing import Any

from engine.grammar.bindings import RAW_VOCABULARY
from engine.grammar.errors import GrammarError
from engine.grammar.gbnf_source import enforceable_gbnf
from engine.grammar.grammar_text import without_surrogates
from engine.grammar.json_grammar import COMPACT, SPACED, finished, schema_text
from engine.grammar.regex_grammar import regex_grammar

_FIELDS: dict[str, frozenset[str]] = {
    "const_string": frozenset(["value"]),
    "any_text": frozenset(["excludes"]),
    "json_schema": frozenset(["json_schema", "is_spaced"]),
    "regex": frozenset(["pattern"]),
    "grammar": frozenset(["grammar"]),
    "sequence": frozenset(["elements"]),
    "or": frozenset(["elements", "apart"]),
    "optional": frozenset(["content"]),
    "plus": frozenset(["content"]),
    "star": frozenset(["content"]),
    "repeat": frozenset(["content", "min", "max"]),
    "tag": frozenset(["begin", "content", "end"]),
    "triggered_tags": frozenset(["triggers", "tags", "at_least_one", "stop_after_first", "excludes"]),
    "tags_with_separator": frozenset(["tags", "separator", "at_least_one", "stop_after_first"]),
    "definition": frozenset(["name"]),
}
"""Types of formats and what they may hold. Ours are definitions, which stand beside the format, and may use
those before them; `is_spaced`, a space behind commas and colons; and `apart`, with which the first element
may be nothing that begins with one of these texts."""

_MAX_REPEAT = 1000


def enforceable_tag(bindings: Any, tag: Any, vocab_size: int, free_whitespace: bool) -> str:
    """The tag as the compiler should get it, in JSON.

    Raises: `GrammarError` that names what it cannot hold, `RuntimeError` when the compiler refuses a part.
    """
    if not isinstance(tag, dict):
        raise GrammarError("must be an object")
    for name in tag.keys() - {"type", "definitions", "format"}:
        raise GrammarError(f'has "{name:.40}", which is not supported')
    walk = _Walk(bindings, free_whitespace)
    walk.define(tag.get("definitions", {}))
    form = walk.format(tag.get("format"), "#/format")
    texts = finished([found["grammar"] for found in walk.schemas], vocab_size)
    for found, text in zip(walk.schemas, texts, strict=True):
        found["grammar"] = text
    for form_apart, texts_apart, at in walk.apart:
        _check_apart(bindings, form_apart, texts_apart, at)
    return json.dumps({"type": "structural_tag", "format": form})


class _Walk:
    def __init__(self, bindings: Any, free_whitespace: bool) -> None:
        self._bindings = bindings
        self._free_whitespace = free_whitespace
        self.schemas: list[dict[str, Any]] = []
        """Formats made of schemas; their grammars are not finished."""

        self.apart: list[tuple[dict[str, Any], list[str], str]] = []
        """Formats, how they may not begin, and their places."""

        self._definitions: dict[str, dict[str, Any]] = {}

    def define(self, definitions: Any) -> None:
        if not isinstance(definitions, dict):
            raise GrammarError('has "definitions", which must be an object')
        for name, form in definitions.items():
            self._definitions[name] = self.format(form, f"#/definitions/{name}")

    def format(self, form: Any, at: str) -> dict[str, Any]:
        if not isinstance(form, dict):
            raise GrammarError(f"must have a format at {at[:200]}, an object")
        kind = form.get("type")
        fields = _FIELDS.get(kind) if isinstance(kind, str) else None
        if fields is None:
            raise GrammarError(f"has a format at {at[:200]} that is not supported: {kind!r:.40}")
        for name in form.keys() - fields - {"type"}:
            raise GrammarError(f'has "{name:.40}" at {at[:200]}, which is not supported')
        if kind == "definition":
            return self._definition(form, at)
        if kind == "json_schema":
            return self._schema(form, at)
        if kind == "regex":
            return self._regex(form, at)
        if kind == "grammar":
            return self._grammar(form, at)
        self._check(form, at)
        done = dict(form)
        if "content" in fields:
            done["content"] = self.format(form.get("content"), f"{at}/content")
        for name in fields & {"elements", "tags"}:
            formats = form.get(name)
            if not isinstance(formats, list):
                raise GrammarError(f'has "{name}" at {at[:200]}, which must be an array')
            done[name] = [self.format(inner, f"{at}/{name}/{i}") for i, inner in enumerate(formats)]
        if apart := done.pop("apart", None):
            if not done["elements"]:
                raise GrammarError(f'has "apart" at {at[:200]}, and no elements')
            self.apart.append((done["elements"][0], apart, f"{at}/elements/0"))
        return done

    def _definition(self, form: dict[str, Any], at: str) -> dict[str, Any]:
        name = form.get("name")
        if not isinstance(name, str) or name not in self._definitions:
            raise GrammarError(f"has a definition at {at[:200]} that is not there: {name!r:.40}")
        return self._definitions[name]

    def _schema(self, form: dict[str, Any], at: str) -> dict[str, Any]:
        separators = SPACED if form.get("is_spaced") else COMPACT
        try:
            text = schema_text(
                self._bindings, form.get("json_schema"), None if self._free_whitespace else separators
            )
        except GrammarError as error:
            raise type(error)(f"{error}, in the schema at {at[:200]}") from None
        self.schemas.append({"type": "grammar", "grammar": text})
        return self.schemas[-1]

    def _regex(self, form: dict[str, Any], at: str) -> dict[str, Any]:
        pattern = form.get("pattern")
        if not isinstance(pattern, str):
            raise GrammarError(f'has "pattern" at {at[:200]}, which must be a string')
        place = f" at {at[:200]}"
        text = regex_grammar(self._bindings, pattern, place, f", in the expression{place}")
        return {"type": "grammar", "grammar": without_surrogates(text)}

    def _grammar(self, form: dict[str, Any], at: str) -> dict[str, Any]:
        text = form.get("grammar")
        if not isinstance(text, str):
            raise GrammarError(f'has "grammar" at {at[:200]}, which must be a string')
        text = enforceable_gbnf(self._bindings, text, f", in the grammar at {at[:200]}")
        return {"type": "grammar", "grammar": text}

    @staticmethod
    def _check(form: dict[str, Any], at: str) -> None:
        """What the compiler would take for more than text, or in too large a number."""
        for name in ("begin", "end"):
            value = form.get(name)
            if isinstance(value, dict):
                raise GrammarError(f'has "{name}" at {at[:200]}, which is not supported as a token')
        texts = form.get("apart", [""])
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise GrammarError(f'has "apart" at {at[:200]}, which must be an array of strings')
        for name in ("min", "max"):
            value = form.get(name, 0)
            if not isinstance(value, int) or value > _MAX_REPEAT:
                raise GrammarError(f'has "{name}" at {at[:200]}, which must be at most {_MAX_REPEAT}')


def _check_apart(bindings: Any, form: dict[str, Any], texts: list[str], at: str) -> None:
    """Raises: `GrammarError` if what follows the format may begin with one of these texts."""
    tag = json.dumps({"type": "structural_tag", "format": form})
    info = bindings.TokenizerInfo([b""], RAW_VOCABULARY, 1, [0], False)
    grammar = bindings.GrammarCompiler(info, 1, False, -1).compile_structural_tag(tag)
    for text in texts:
        if bindings.GrammarMatcher(grammar, [0], False, -1, None).accept_string(text, False):
            raise GrammarError(f"cannot be told from an answer that begins with {text!r:.80}, at {at[:200]}")
