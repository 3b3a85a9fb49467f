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

_MOST_BEHIND = 256
"""Tokens; to hear of them at once takes the library a tenth of a millisecond."""


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
        "_behind",
        "_end_ids",
        "_has_ended",
        "_has_mask",
        "_held",
        "_is_open",
        "_is_watched",
        "_largest",
        "_library_mask",
        "_mask",
        "_may_end",
        "_memory",
        "_num_accepted",
        "_own_mask",
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
        self._mask = self._own_mask = np.empty(-(-len(grammar.vocabulary.tokens) // 32), np.int32)
        self._library_mask = grammar.bindings.from_dlpack(self._own_mask)
        self._has_mask = self._may_end = self._has_ended = False
        self._held: int | None = None
        """The last token of a forced text, which is drawn: it, or a longer one."""
        self._is_open = False
        """Whether no text was forced when it last went on: likely, none is behind the next token either."""
        self._behind: list[bytes] = []
        """Tokens within a string of which the library's matcher has not heard yet."""
        self._num_accepted = 0
        """Texts that the library's matcher has gone over: drawn tokens, and forced ones some at a time."""
        self._is_watched, self._slow_s = False, 0.0
        self._memory, self._largest, self.excess = MemoryCheck(), grammar.largest, ""
        self._settle()
        if self.is_over and grammar.vocabulary.end_token_id is not None:
            self.forced.append(grammar.vocabulary.end_token_id)  # or anything would be drawn for no text

    @property
    def is_over(self) -> bool:
        """Whether the answer is complete, and nothing may follow."""
        return self._has_ended and not self.forced

    def mask(self, row: np.ndarray) -> np.ndarray:
        """The bitmask of the next token, int32 [ceil(V / 32)]: `row`, overwritten, or an array that must
        not be written to."""
        if self.forced:
            allow_only(row, self.forced[0])
        elif self._has_ended:
            row[:] = -1
        elif self.excess:
            row[:] = 0
        elif self._held is not None:
            vocabulary = self._vocabulary
            held = np.append(vocabulary.longer(self._held), self._held)
            np.bitwise_and(self._grammar_mask(), only(len(vocabulary.tokens), held), out=row)
        else:
            return self._grammar_mask()
        return row

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
        elif self._place is not None and len(self._behind) < _MOST_BEHIND and self._place.goes_on(token_id):
            self._behind.append(self._vocabulary.tokens[token_id])
            self._has_mask = False
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
        self._accept_in_grammar(token_id)
        self.forced.append(token_id)
        self._settle()

    # --- going back

    def state(self) -> tuple:
        """What `go_back` needs to come back here."""
        place = None if self._place is None else self._place.state()
        num_accepted, behind, forced = self._num_accepted, tuple(self._behind), tuple(self.forced)
        return num_accepted, behind, forced, self._has_ended, place, self.excess, self._held

    def go_back(self, state: tuple) -> None:
        """Forget everything since `state` was given."""
        num_accepted, behind, forced, self._has_ended, place, self.excess, self._held = state
        num_more = self._num_accepted - num_accepted
        if num_more:
            self.handle.rollback(num_more)
            self._num_accepted = num_accepted
        if num_more or len(self._behind) != len(behind):
            self._behind[:] = behind
            self._has_mask = False
        if self._place is not None:
            self._place.go_back(place)
        self.forced.clear()
        self.forced.extend(forced)

    def _settle(self) -> None:
        """Go on over all that is forced now, and work out the mask of what comes then."""
        self._held = None
        # Within most texts nothing is forced for long, and the mask, needed anyway, shows it.
        if self._is_open and self._allows_witnesses():
            self._learn()
            return
        self._is_open = False
        text = forced_text(self.handle)
        if text:
            token_ids = self._vocabulary.canonical(text) if len(text) <= MAX_FORCED_BYTES else ()
            if not token_ids:
                return
            *head, last = token_ids
            self._accept(head)
            longer = self._vocabulary.longer(last)
            if len(longer) and allows(self._grammar_mask(), longer):
                self._held = last
                return
            self._accept([last])
        self._is_open = self._allows_witnesses()
        if self._is_open:
            self._learn()
        elif self._is_at_end():
            self._has_ended = True
            self.forced.extend(self._end_ids[:1])

    def _allows_witnesses(self) -> bool:
        """Whether two tokens may come next that begin differently, so that no text is forced."""
        witnesses = self._vocabulary.witnesses
        if witnesses is None:
            return False
        mask, (a, b) = self._grammar_mask(), witnesses
        return bool(mask.item(a >> 5) >> (a & 31) & mask.item(b >> 5) >> (b & 31) & 1)

    def _accept(self, token_ids: list[int]) -> None:
        """Go on over forced tokens."""
        if token_ids:
            tokens = self._vocabulary.tokens
            text = b"".join([tokens[token_id] for token_id in token_ids])
            self._catch_up()
            if not self.handle.accept_string(text, False):
                raise RuntimeError(f"the grammar forces {text!r} and does not accept it")
            self._went_on(text)
            self.forced.extend(token_ids)

    def _accept_in_grammar(self, token_id: int) -> None:
        self._catch_up()
        if not self.handle.accept_token(token_id, False):
            raise RuntimeError(f"the grammar allows or forces token {token_id} and does not accept it")
        self._went_on(self._vocabulary.tokens[token_id])

    def _catch_up(self) -> None:
        if self._behind:
            text = b"".join(self._behind)
            if not self.handle.accept_string(text, False):
                raise RuntimeError(f"the grammar allows {text!r} within a string and does not accept it")
            self._num_accepted += 1
            self._behind.clear()

    def _learn(self) -> None:
        if self._place is not None:
            self._place.learn(self.handle, self._grammar_mask())

    def _went_on(self, text: bytes) -> None:
        self._num_accepted += 1
        self._has_mask = False
        if self._place is not None:
            self._place.saw(text)

    def _is_at_end(self) -> bool:
        """Whether nothing but the end is allowed."""
        mask = self._grammar_mask()
        if not self._may_end:
            return False
        rest = mask.copy()
        forbid(rest, self._end_ids)
        return not rest.any()

    def _grammar_mask(self) -> np.ndarray:
        """What the grammar allows behind all that is forced; overwritten when it goes on."""
        if not self._has_mask:
            self._has_mask = True
            self._may_end = False
            mask = None if self._place is None else self._place.mask(self.handle, self._own_mask)
            if mask is None:
                self.handle.fill_next_token_bitmask(self._library_mask, 0, False)
                mask = self._own_mask
                self._may_end = bool(mask.item(self._stop_id >> 5) >> (self._stop_id & 31) & 1)
                if not self._end_ids:
                    forbid(mask, [self._stop_id])
            self._mask = mask
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
            row[:] = -1 if matcher is None else matcher.mask(row)
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
