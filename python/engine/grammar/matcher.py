"""Where each constrained answer stands in its grammar, and what may come next."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from engine.grammar.compiler import CompiledGrammar
from engine.grammar.matcher_memory import MemoryCheck
from engine.grammar.string_masks import StringPlace
from engine.grammar.trial import MAX_FORCED_BYTES, forced_text
from engine.grammar.vocabulary import Vocabulary, allow_only, allows, forbid, only

if TYPE_CHECKING:
    from engine.grammar.channel_budget import BoundedThoughts
    from engine.grammar.guarded import GuardedMatcher
    from engine.grammar.thinking import ThinkingMatcher

    AnyMatcher: TypeAlias = "ConstraintMatcher | ThinkingMatcher | BoundedThoughts | GuardedMatcher"

MAX_BYTES = 2**25
"""Memory of the matcher of an answer, then the answer ends. Each byte of JSON takes 50 to 200."""
QUICK_S = 0.01
"""Time to match a token that is not counted."""
MAX_SLOW_S = 1.0
"""CPU time beyond `QUICK_S` a token that matching an answer may take, then the answer ends."""


class ConstraintMatcher:
    """One answer and its grammar.

    `forced` are tokens that must come next, one after the other: forced text is cut into the fewest
    tokens that spell it, and its last token is left open when the answer may go on with a longer one.
    The grammar is always advanced to behind them. `is_over` says that nothing may follow.

    `stop_ids` are the tokens that end an answer. Those of them that are no text are allowed only where
    the grammar may end; where it must, one of them is forced, and if there is none, the answer is over
    without it. The others are text like any other.

    Some grammars take the more time and memory, the longer the answer is, and no trial before shows it. When
    matching takes too much, `excess` says of what, and no token is allowed any more.
    """

    __slots__ = (
        "_end_ids",
        "_has_ended",
        "_has_mask",
        "_held",
        "_is_watched",
        "_largest",
        "_library_mask",
        "_mask",
        "_may_end",
        "_memory",
        "_num_accepted",
        "_place",
        "_slow_s",
        "_stop_id",
        "_vocabulary",
        "excess",
        "forced",
        "handle",
    )

    def __init__(self, grammar: CompiledGrammar, stop_ids: Iterable[int]) -> None:
        self.forced: deque[int] = deque()
        self._vocabulary = grammar.vocabulary
        self._end_ids = _end_ids(stop_ids, grammar.vocabulary)
        # The library wants one stop token at least; one that is never allowed stands in for none.
        self._stop_id = self._end_ids[0] if self._end_ids else grammar.vocabulary.tokens.index(b"")
        stop_ids = self._end_ids or [self._stop_id]
        self.handle = grammar.bindings.GrammarMatcher(grammar.handle, stop_ids, False, -1, None)
        self._place = None if grammar.strings is None else StringPlace(*grammar.strings)
        self._mask = np.empty(-(-len(grammar.vocabulary.tokens) // 32), np.int32)
        self._library_mask = grammar.bindings.from_dlpack(self._mask)
        self._has_mask = self._may_end = self._has_ended = False
        self._held: int | None = None
        """The last token of a forced text, which is drawn: it, or a longer one."""
        self._num_accepted = 0
        self._is_watched, self._slow_s = False, 0.0
        self._memory, self._largest, self.excess = MemoryCheck(), grammar.largest, ""
        self._settle()
        if self.is_over and grammar.vocabulary.end_token_id is not None:
            self.forced.append(grammar.vocabulary.end_token_id)  # or anything would be drawn for no text

    @property
    def is_over(self) -> bool:
        """Whether the answer is complete, and nothing may follow."""
        return self._has_ended and not self.forced

    def fill(self, row: np.ndarray) -> None:
        """Write the bitmask of the next token, int32 [ceil(V / 32)]."""
        if self.forced:
            allow_only(row, self.forced[0])
        elif self._has_ended:
            row[:] = -1
        elif self.excess:
            row[:] = 0
        else:
            row[:] = self._next_mask()
            if self._held is not None:
                vocabulary = self._vocabulary
                held = np.append(vocabulary.longer(self._held), self._held)
                row &= only(len(vocabulary.tokens), held)

    def forbid_end(self, row: np.ndarray) -> None:
        """Take out of a mask what would end the output: the answer is still to come."""
        forbid(row, self._end_ids)

    # --- advancing

    def take(self, token_id: int) -> None:
        """Go on behind a token that was drawn.

        The mask of the next one is worked out right then: what the matching of a grammar touches is in the
        processor's caches, from which the model will have driven it by the next step.
        """
        if self.forced:
            assert self.forced[0] == token_id, "a token was drawn that the mask does not allow"
            self.forced.popleft()
        elif token_id in self._end_ids:
            self._has_ended = True
        elif not self._has_ended:
            began_s = time.perf_counter()
            cpu_began_s = time.thread_time() if self._is_watched else 0.0
            self._accept_in_grammar(token_id)
            self._settle()
            if self._is_watched:
                self._slow_s += max(0.0, time.thread_time() - cpu_began_s - QUICK_S)
                if self._slow_s >= MAX_SLOW_S:
                    self._end(f"takes too long to match a long answer, {MAX_SLOW_S:g} s in slow tokens")
            took_s = time.perf_counter() - began_s
            if took_s > QUICK_S:
                self._is_watched = True  # from here on by CPU time, which takes microseconds to ask for
            if self._memory.spent(took_s) and self._memory.is_over(self.handle, MAX_BYTES):
                self._end(f"takes more than {MAX_BYTES >> 20} MiB of memory to match a long answer")

    def _end(self, what: str) -> None:
        self.excess = f"{what}; {self._largest}" if self._largest else what

    def force(self, token_id: int) -> None:
        """Put a token behind those that are forced already; the grammar must allow it."""
        self._accept([token_id])
        self._settle()

    # --- going back

    def state(self) -> tuple:
        """What `go_back` needs to come back here."""
        place = None if self._place is None else self._place.state()
        return self._num_accepted, tuple(self.forced), self._has_ended, place, self.excess, self._held

    def go_back(self, state: tuple) -> None:
        """Forget everything since `state` was given."""
        num_accepted, forced, self._has_ended, place, self.excess, self._held = state
        if self._num_accepted > num_accepted:
            self.handle.rollback(self._num_accepted - num_accepted)
            self._num_accepted = num_accepted
            self._has_mask = False
        if self._place is not None:
            self._place.go_back(place)
        self.forced.clear()
        self.forced.extend(forced)

    def _settle(self) -> None:
        """Go on over all that is forced now, and work out the mask of what comes then."""
        self._held = None
        while True:
            text = forced_text(self.handle)
            token_ids = self._vocabulary.canonical(text) if 0 < len(text) <= MAX_FORCED_BYTES else ()
            if not token_ids:
                break
            *head, last = token_ids
            self._accept(head)
            longer = self._vocabulary.longer(last)
            if len(longer) and allows(self._next_mask(), longer):
                self._held = last
                return
            self._accept([last])
        if not text and self._is_at_end():
            self._has_ended = True
            self.forced.extend(self._end_ids[:1])

    def _accept(self, token_ids: list[int]) -> None:
        for token_id in token_ids:
            self._accept_in_grammar(token_id)
        self.forced.extend(token_ids)

    def _accept_in_grammar(self, token_id: int) -> None:
        if not self.handle.accept_token(token_id, False):
            raise RuntimeError(f"the grammar allows or forces token {token_id} and does not accept it")
        self._num_accepted += 1
        self._has_mask = False
        if self._place is not None:
            self._place.saw(self._vocabulary.tokens[token_id])

    def _is_at_end(self) -> bool:
        """Whether nothing but the end is allowed."""
        mask = self._next_mask()
        if not self._may_end:
            return False
        rest = mask.copy()
        forbid(rest, self._end_ids)
        return not rest.any()

    def _next_mask(self) -> np.ndarray:
        """What the grammar allows behind all that is forced; overwritten when it goes on."""
        if not self._has_mask:
            self._has_mask = True
            self._may_end = False
            if self._place is None or not self._place.fill(self.handle, self._mask):
                self.handle.fill_next_token_bitmask(self._library_mask, 0, False)
                self._may_end = bool(self._mask.item(self._stop_id >> 5) >> (self._stop_id & 31) & 1)
                if not self._end_ids:
                    forbid(self._mask, [self._stop_id])
        return self._mask


class MatcherBatch:
    """The matchers of a step."""

    def __init__(self, max_rows: int, vocab_size: int) -> None:
        self._masks = np.empty((max_rows, -(-vocab_size // 32)), np.int32)

    def fill(self, matchers: Sequence[AnyMatcher | None]) -> np.ndarray | None:
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
        self,
        matchers: Sequence[AnyMatcher | None],
        token_ids: Sequence[int],
    ) -> None:
        """Tell every matcher the token that was drawn; a negative one is none."""
        for matcher, token_id in zip(matchers, token_ids, strict=True):
            if matcher is not None and token_id >= 0:
                matcher.take(token_id)


def _end_ids(stop_ids: Iterable[int], vocabulary: Vocabulary) -> list[int]:
    """Stop tokens without text, the tokenizer's own first."""
    ids = [token_id for token_id in stop_ids if not vocabulary.tokens[token_id]]
    return sorted(ids, key=lambda token_id: (token_id != vocabulary.end_token_id, token_id))
