"""Where each constrained answer stands in its grammar, and what may come next."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.grammar.compiler import CompiledGrammar
from engine.grammar.trial import MAX_FORCED_BYTES, forced_text
from engine.grammar.vocabulary import Vocabulary, allow_only, allows, forbid

if TYPE_CHECKING:
    from engine.grammar.thinking import ThinkingMatcher

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
    def wants_mask(self) -> bool:
        """Whether the next token is the grammar's to choose from, and the mask is not worked out yet."""
        return not self._has_ended and not self.forced and self._mask is None

    def give_mask(self, mask: np.ndarray) -> None:
        """What the grammar allows next, valid until `forget_mask`."""
        self._clean(mask)
        self._mask = mask

    def forget_mask(self) -> None:
        """The memory of the mask from `give_mask` goes to others."""
        self._mask = None

    def fill(self, row: np.ndarray) -> None:
        """Write the bitmask of the next token, int32 [ceil(V / 32)]."""
        if self.forced:
            allow_only(row, self.forced[0])
        elif self._has_ended:
            row[:] = -1
        else:
            row[:] = self._next_mask() if self._mask is None else self._mask

    def forbid_end(self, row: np.ndarray) -> None:
        """Take out of a mask what would end the output: the answer is still to come."""
        forbid(row, self._end_ids)

    # --- advancing

    def take(self, token_id: int) -> ConstraintMatcher | None:
        """A token was drawn; the matcher whose grammar has to accept it (`accepted` follows then), if any."""
        if self.forced:
            assert self.forced[0] == token_id, "a token was drawn that the mask does not allow"
            self.forced.popleft()
            return None
        self._mask = None
        if token_id in self._end_ids:
            self._has_ended = True
        return None if self._has_ended else self

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

    def _next_mask(self) -> np.ndarray:
        mask = np.empty((1, -(-len(self._vocabulary.tokens) // 32)), np.int32)
        self.handle.fill_next_token_bitmask(mask, 0, False)
        self._clean(mask[0])
        return mask[0]

    def _clean(self, mask: np.ndarray) -> None:
        """Take the token that stands in for an end out of a mask of the library's."""
        if self._no_end_id is not None:
            forbid(mask, [self._no_end_id])


class MatcherBatch:
    """The matchers of a step, advanced in one call.

    The masks of the step after are worked out right then (`fill_ahead`): what a grammar's matching
    touches is in the processor's caches, from which the model will have driven it by then.
    """

    def __init__(self, max_rows: int, vocab_size: int) -> None:
        self._masks, self._ahead = np.empty((2, max_rows, -(-vocab_size // 32)), np.int32)
        self._owners: list[ConstraintMatcher] = []
        self._moved: dict[ConstraintMatcher, None] = {}
        self._library: Any = None

    def fill(self, matchers: Sequence[ConstraintMatcher | ThinkingMatcher | None]) -> np.ndarray | None:
        """Bitmasks int32 [R, ceil(V / 32)] of the next tokens, a row for each matcher.

        All tokens are allowed where there is no matcher; None if there is none at all. The masks are
        overwritten by the next call.
        """
        if not any(matchers):
            return None
        masks = self._masks[: len(matchers)]
        for matcher, row in zip(matchers, masks, strict=True):
            if matcher is None:
                row[:] = -1
            else:
                matcher.fill(row)
        return masks

    def advance(
        self, matchers: Sequence[ConstraintMatcher | ThinkingMatcher | None], token_ids: Sequence[int]
    ) -> None:
        """Tell every matcher the token that was drawn; a negative one is none."""
        for owner in self._owners:
            owner.forget_mask()
        self._owners = []
        moving: list[ConstraintMatcher] = []
        taken: list[int] = []
        for matcher, token_id in zip(matchers, token_ids, strict=True):
            if matcher is not None and token_id >= 0:
                constrained = matcher.take(token_id)
                if constrained is not None:
                    moving.append(constrained)
                    taken.append(token_id)
        if not moving:
            return
        if self._library is None:
            self._library = moving[0].bindings.BatchGrammarMatcher(1)
        if not all(self._library.batch_accept_token([m.handle for m in moving], taken, False)):
            raise RuntimeError("a token was drawn that a grammar does not accept")
        for matcher in moving:
            matcher.accepted()
        self._moved.update(dict.fromkeys(moving))

    def fill_ahead(self) -> None:
        """Work out the masks for the next step of those that have been advanced since the last call."""
        owners = self._owners = [matcher for matcher in self._moved if matcher.wants_mask]
        self._moved.clear()
        if owners:
            masks = self._ahead[: len(owners)]
            self._library.batch_fill_next_token_bitmask([m.handle for m in owners], masks, None, False)
            for matcher, mask in zip(owners, masks, strict=True):
                matcher.give_mask(mask)


def _end_ids(stop_ids: Iterable[int], vocabulary: Vocabulary) -> list[int]:
    """Stop tokens without text, the tokenizer's own first."""
    ids = [token_id for token_id in stop_ids if not vocabulary.tokens[token_id]]
    return sorted(ids, key=lambda token_id: (token_id != vocabulary.end_token_id, token_id))
