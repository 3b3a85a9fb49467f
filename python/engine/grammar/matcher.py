"""Where each constrained answer stands in its grammar, and what may come next."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from engine.grammar.compiler import CompiledGrammar
from engine.grammar.trial import MAX_FORCED_BYTES, forced_text
from engine.grammar.vocabulary import Vocabulary, allow_only, allows, forbid

FORCED_BYTES = 512
"""Forced text that is cut into tokens at a time, so that no single step is held up by it."""


class ConstraintMatcher:
    """One answer and its grammar.

    `forced` are tokens that must come next, one after the other: forced text is cut into the fewest
    tokens that spell it, and its last token is left open when the answer may go on with a longer one.
    The grammar is always advanced to behind them. `is_over` says that nothing may follow.

    `stop_ids` are the tokens that end an answer. Those of them that are no text are allowed only where
    the grammar may end; where it must, one of them is forced, and if there is none, the answer is over
    without it. The others are text like any other.
    """

    __slots__ = (
        "_end_ids",
        "_has_ended",
        "_mask",
        "_no_end_id",
        "_num_accepted",
        "_vocabulary",
        "bindings",
        "forced",
        "handle",
    )

    def __init__(self, grammar: CompiledGrammar, stop_ids: Iterable[int]) -> None:
        self.forced: deque[int] = deque()
        self._vocabulary = grammar.vocabulary
        self._end_ids = _end_ids(stop_ids, grammar.vocabulary)
        # The library wants one stop token at least; one that is never allowed stands in for none.
        self._no_end_id = None if self._end_ids else grammar.vocabulary.tokens.index(b"")
        self.bindings = grammar.bindings
        self.handle = grammar.bindings.GrammarMatcher(
            grammar.handle, self._end_ids or [self._no_end_id], False, -1, None
        )
        self._mask: np.ndarray | None = None
        self._has_ended = False
        self._num_accepted = 0
        self._settle()

    @property
    def is_over(self) -> bool:
        """Whether the answer is complete, and nothing may follow."""
        return self._has_ended and not self.forced

    @property
    def is_free(self) -> bool:
        """Whether the next token is the grammar's to choose from: a mask has to be worked out."""
        return not self._has_ended and not self.forced and self._mask is None

    def fill(self, row: np.ndarray) -> None:
        """Write the bitmask of the next token, int32 [ceil(V / 32)], unless `is_free`."""
        if self.forced:
            allow_only(row, self.forced[0])
        elif self._mask is not None:
            row[:] = self._mask
        else:
            row[:] = -1

    def forbid_end(self, row: np.ndarray) -> None:
        """Take out of a mask what would end the output: the answer is still to come."""
        forbid(row, self._end_ids)

    def clean(self, row: np.ndarray) -> None:
        """Take the token that stands in for an end out of a mask of the library's."""
        if self._no_end_id is not None:
            forbid(row, [self._no_end_id])

    # --- advancing

    def take(self, token_id: int) -> bool:
        """A token was drawn; whether the grammar has to accept it (`accepted` follows then)."""
        if self.forced:
            assert self.forced[0] == token_id, "a token was drawn that the mask does not allow"
            self.forced.popleft()
            return False
        self._mask = None
        if token_id in self._end_ids:
            self._has_ended = True
        return not self._has_ended

    def accepted(self) -> None:
        """The grammar has accepted the token."""
        self._num_accepted += 1
        self._settle()

    def accept(self, token_id: int) -> None:
        """Have the grammar accept a token, alone and not in a batch."""
        self._accept_in_grammar(token_id)
        self._settle()

    # --- going back

    def state(self) -> tuple:
        """What `go_back` needs to come back here."""
        return self._num_accepted, tuple(self.forced), self._mask, self._has_ended

    def go_back(self, state: tuple) -> None:
        """Forget everything since `state` was given."""
        num_accepted, forced, self._mask, self._has_ended = state
        if self._num_accepted > num_accepted:
            self.handle.rollback(self._num_accepted - num_accepted)
            self._num_accepted = num_accepted
        self.forced.clear()
        self.forced.extend(forced)

    def _settle(self) -> None:
        """Go on over all that is forced now."""
        handle = self.handle
        while True:
            if handle.is_completed():
                self._mask = self._next_mask()
                if not self._goes_on(self._mask):
                    self._has_ended = True
                    self.forced.extend(self._end_ids[:1])
                return
            text = forced_text(handle)
            if not text or len(text) > MAX_FORCED_BYTES:
                return
            token_ids = self._vocabulary.canonical(text[:FORCED_BYTES])
            if not token_ids:
                return
            *head, last = token_ids
            self._accept(head)
            if head and len(text) > FORCED_BYTES:
                continue
            longer = self._vocabulary.longer(last)
            if len(longer):
                mask = self._next_mask()
                if allows(mask, longer):
                    self._mask = mask
                    return
            self._accept([last])

    def _accept(self, token_ids: list[int]) -> None:
        for token_id in token_ids:
            self._accept_in_grammar(token_id)
        self.forced.extend(token_ids)

    def _accept_in_grammar(self, token_id: int) -> None:
        if not self.handle.accept_token(token_id, False):
            raise RuntimeError(f"the grammar allows or forces token {token_id} and does not accept it")
        self._num_accepted += 1

    def _goes_on(self, mask: np.ndarray) -> bool:
        """Whether anything but the end is allowed."""
        rest = mask.copy()
        forbid(rest, self._end_ids)
        return bool(rest.any())

    def fill_free(self, row: np.ndarray) -> None:
        """Write the bitmask of the next token if `is_free`, alone and not in a batch."""
        self.handle.fill_next_token_bitmask(row[None], 0, False)
        self.clean(row)

    def _next_mask(self) -> np.ndarray:
        mask = np.empty(-(-len(self._vocabulary.tokens) // 32), np.int32)
        self.fill_free(mask)
        return mask


class MatcherBatch:
    """The matchers of a step, advanced and asked in one call each."""

    def __init__(self, max_rows: int, vocab_size: int) -> None:
        self._masks = np.empty((max_rows, -(-vocab_size // 32)), np.int32)
        self._filler: Any = None

    def fill(self, matchers: Sequence[ConstraintMatcher | None]) -> np.ndarray | None:
        """Bitmasks int32 [R, ceil(V / 32)] of the next tokens, a row for each matcher.

        All tokens are allowed where there is no matcher; None if there is none at all. The masks are
        overwritten by the next call.
        """
        if not any(matchers):
            return None
        masks = self._masks[: len(matchers)]
        free: list[ConstraintMatcher] = []
        rows: list[int] = []
        for row, matcher in enumerate(matchers):
            if matcher is None:
                masks[row] = -1
            elif matcher.is_free:
                free.append(matcher)
                rows.append(row)
            else:
                matcher.fill(masks[row])
        if free:
            if self._filler is None:
                self._filler = free[0].bindings.BatchGrammarMatcher(1)
            handles = [matcher.handle for matcher in free]
            self._filler.batch_fill_next_token_bitmask(handles, masks, rows, False)
            for matcher, row in zip(free, rows, strict=True):
                matcher.clean(masks[row])
        return masks

    def advance(self, matchers: Sequence[ConstraintMatcher | None], token_ids: Sequence[int]) -> None:
        """Tell every matcher the token that was drawn; a negative one is none."""
        moving = [
            (matcher, token_id)
            for matcher, token_id in zip(matchers, token_ids, strict=True)
            if matcher is not None and token_id >= 0 and matcher.take(token_id)
        ]
        if not moving:
            return
        bindings = moving[0][0].bindings
        results = bindings.BatchGrammarMatcher.batch_accept_token(
            [matcher.handle for matcher, _ in moving], [token_id for _, token_id in moving], False
        )
        if not all(results):
            raise RuntimeError("a token was drawn that a grammar does not accept")
        for matcher, _ in moving:
            matcher.accepted()


def _end_ids(stop_ids: Iterable[int], vocabulary: Vocabulary) -> list[int]:
    """Stop tokens without text, the tokenizer's own first."""
    ids = [token_id for token_id in stop_ids if not vocabulary.tokens[token_id]]
    return sorted(ids, key=lambda token_id: (token_id != vocabulary.end_token_id, token_id))
