"""Constraints compiled here and now, for tests of what a grammar accepts."""

from __future__ import annotations

import functools
import json
import random
from typing import Any

import numpy as np

from engine.config.model_location import bundled_model
from engine.grammar.bindings import load_bindings
from engine.grammar.compile import compile_prepared, make_tokenizer_info, prepare, strings_of
from engine.grammar.compiler import CompiledGrammar
from engine.grammar.known_paths import KnownPaths
from engine.grammar.string_masks import StringTables
from engine.grammar.vocabulary import Vocabulary, VocabularyData
from engine.sampling.constraint import Constraint
from engine.text.tokenizer import Tokenizer


class Grammars:
    """Compiles for one vocabulary, without a helper process."""

    def __init__(self, data: VocabularyData, free_whitespace: bool = False) -> None:
        self.bindings = load_bindings()
        self.vocabulary, self.paths = Vocabulary(data), KnownPaths()
        self.end_id = data.tokens.index(b"")
        self.quote_id = data.tokens.index(b'"')
        self._free_whitespace = free_whitespace
        info = make_tokenizer_info(self.bindings, data)
        self._compiler = self.bindings.GrammarCompiler(info, 1, False, -1)

    @functools.cached_property
    def tables(self) -> StringTables:
        return StringTables(self.bindings, self._compiler, self.vocabulary.tokens)

    def compile(self, kind: str, text: Any = "", *, counts: bool = False) -> CompiledGrammar:
        """`counts`: as with a vocabulary for which the masks of bounded strings cannot be prepared.

        Raises: `GrammarError`.
        """
        text = text if isinstance(text, str) else json.dumps(text)
        constraint = Constraint(kind, text)
        size = 10**9 if counts else len(self.vocabulary.tokens)
        prepared = prepare(self.bindings, constraint, size, self._free_whitespace)
        handle = compile_prepared(self._compiler, prepared)
        strings = strings_of(self.tables, handle, constraint)
        return CompiledGrammar(self.bindings, handle, self.vocabulary, self.paths, strings)

    def accepts(self, grammar: CompiledGrammar, text: str | bytes) -> bool:
        """Whether this is a whole answer."""
        matcher = self.bindings.GrammarMatcher(grammar.handle, [self.end_id], False, -1, None)
        return bool(matcher.accept_string(text, False) and matcher.is_completed())

    def random_answer(self, grammar: CompiledGrammar, seed: int, most: int = 200) -> bytes | None:
        """An answer put together from tokens drawn by chance; None if it has not ended after `most`."""
        draw = random.Random(seed)
        matcher = self.bindings.GrammarMatcher(grammar.handle, [self.end_id], False, -1, None)
        mask = np.empty((1, -(-len(self.vocabulary.tokens) // 32)), np.int32)
        answer = b""
        for _ in range(most):
            matcher.fill_next_token_bitmask(mask, 0, False)
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
            token_id = int(draw.choice(allowed))
            if draw.random() < 0.2:  # or hardly any string would ever end
                token_id = next((i for i in (self.end_id, self.quote_id) if i in allowed), token_id)
            if token_id == self.end_id:
                return answer
            assert matcher.accept_token(token_id, False)
            answer += self.vocabulary.tokens[token_id]
        return None


@functools.cache
def bundled_vocabulary() -> VocabularyData:
    tokenizer = Tokenizer.from_directory(bundled_model())
    return VocabularyData.from_tokenizer(tokenizer, tokenizer.vocab_size)
