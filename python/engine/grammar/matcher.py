"""Where each constrained answer stands in its grammar, and what may come next."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from engine.grammar.compiler import CompiledGrammar
from engine.grammar.known_paths import MAX_NEW, Situation, Waypoint
from engine.grammar.late_matcher import LateMatcher
from engine.grammar.string_masks import ESCAPE, LONG_ENOUGH, QUOTE, Bounds, StringPlace
from engine.grammar.trial import MAX_FORCED_BYTES
from engine.grammar.vocabulary import Vocabulary, allow_only, allows, forbid, only

if TYPE_CHECKING:
    from engine.grammar.channel_budget import BoundedThoughts
    from engine.grammar.guarded import GuardedMatcher
    from engine.grammar.thinking import ThinkingMatcher

    AnyMatcher: TypeAlias = "ConstraintMatcher | ThinkingMatcher | BoundedThoughts | GuardedMatcher"


class ConstraintMatcher:
    """One answer and its grammar.

    `forced` are tokens that must come next, one after the other: forced text is cut into the fewest
    tokens that spell it, and its last token is left open when the answer may go on with a longer one.
    The grammar is always advanced to behind them. `is_over` says that nothing may follow.

    `stop_ids` are the tokens that end an answer. Those of them that are no text are allowed only where
    the grammar may end; where it must, one of them is forced, and if there is none, the answer is over
    without it. The others are text like any other.

    Once matching takes too much, `excess` says of what, and no token is allowed any more.
    """

    __slots__ = (
        "_end_ids",
        "_grammar",
        "_has_ended",
        "_has_mask",
        "_held",
        "_is_open",
        "_library",
        "_library_mask",
        "_mask",
        "_may_end",
        "_num_new",
        "_own_mask",
        "_paths",
        "_stop_id",
        "_string",
        "_vocabulary",
        "_waypoint",
        "forced",
    )

    def __init__(self, grammar: CompiledGrammar, stop_ids: Iterable[int]) -> None:
        self.forced: deque[int] = deque()
        self._grammar, self._vocabulary = grammar, grammar.vocabulary
        self._end_ids = _end_ids(stop_ids, grammar.vocabulary)
        # The library wants one stop token at least; one that is never allowed stands in for none.
        self._stop_id = self._end_ids[0] if self._end_ids else grammar.vocabulary.tokens.index(b"")
        stop_ids = self._end_ids or [self._stop_id]
        self._library = LateMatcher(
            grammar.bindings.GrammarMatcher(grammar.handle, stop_ids, False, -1, None)
        )
        self._string = None if grammar.strings is None else StringPlace(*grammar.strings)
        self._mask = self._own_mask = np.empty(-(-len(grammar.vocabulary.tokens) // 32), np.int32)
        self._library_mask = grammar.bindings.from_dlpack(self._own_mask)
        self._has_mask = self._may_end = self._has_ended = False
        self._held: int | None = None
        """The last token of a forced text, which is drawn: it, or a longer one."""
        self._is_open = False
        """Whether no text was forced when it last went on: likely, none is behind the next token either."""
        self._num_new = 0
        self._paths = grammar.paths.of(grammar, tuple(self._end_ids))
        self._waypoint: Waypoint | None = None if grammar.names_tokens else self._paths.start
        """Where the answer is on the known paths, along which text leads; none once it has left them."""
        if (situation := self._paths.situation) is not None:
            self._enter(situation, b"")
        else:
            self._settle()
            self._paths.start.text = self._forced_text()
            self._paths.situation = self._situation(0.0)
        if self.is_over and grammar.vocabulary.end_token_id is not None:
            self.forced.append(grammar.vocabulary.end_token_id)  # or anything would be drawn for no text

    @property
    def is_over(self) -> bool:
        """Whether the answer is complete, and nothing may follow."""
        return self._has_ended and not self.forced

    @property
    def excess(self) -> str:
        """What matching takes too much of; nothing as a rule."""
        return self._library.excess

    def mask(self, row: np.ndarray) -> np.ndarray:
        """The bitmask of the next token, int32 [ceil(V / 32)]: `row`, overwritten, or an array that must
        not be written to."""
        if self.forced:
            allow_only(row, self.forced[0])
        elif self._has_ended:
            row[:] = -1
        elif self.excess:
            row[:] = 0
        else:
            return self._next_mask()
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
        elif self._string is not None and self._library.can_wait() and self._string.goes_on(token_id):
            self._library.leave_out(self._vocabulary.tokens[token_id])
            self._has_mask = False
        elif token_id in self._end_ids:
            self._has_ended = True
        elif not self._has_ended:
            self._follow(token_id)

    def force(self, token_id: int) -> None:
        """Put a token behind those that are forced already; the grammar must allow it."""
        self._waypoint = None
        self._accept_in_grammar(token_id)
        self.forced.append(token_id)
        self._settle()

    def _match(self, token_id: int) -> float:
        """Go on in the library's matcher; the seconds that it took."""
        began = self._library.start_watch()
        self._accept_in_grammar(token_id)
        self._settle()
        return self._library.end_watch(began, self._grammar.largest)

    # --- on known paths

    def _follow(self, token_id: int) -> None:
        """Go on as another answer did before, or as the library finds."""
        before, string, token = self._waypoint, self._string, self._vocabulary.tokens[token_id]
        key = token_id if string is None else string.key(token_id)
        passage = None if before is None or key is None else before.passages.get(key)
        situation = None if passage is None else passage.situation
        if passage is not None and situation is not None and self._library.can_wait(situation.match_s):
            self._waypoint = passage.to or before
            if key is LONG_ENOUGH:
                string.follow(token_id, situation.string)
                self._library.leave_out(token, situation.match_s)
                self._has_mask = False
            else:
                self._enter(situation, token)
            return
        here = None if string is None else string.here
        match_s = self._match(token_id)
        if before is None:
            return
        text = token + self._forced_text()
        is_inside = (
            here is not None and self._string.here is here and QUOTE not in text and ESCAPE not in text
        )
        if passage is None and (key is None or self._num_new == MAX_NEW):
            if not is_inside:
                self._waypoint = None
            return
        to = None if is_inside else self._waypoint_behind(before, here, text)
        if passage is None:
            self._num_new += 1
            self._paths.add(before, key, to)
        elif passage.to is not to:  # one of two knew the string for what it is, and the other did not
            self._waypoint = None
            return
        elif situation is None or match_s < situation.match_s:
            passage.situation = self._situation(match_s)
        self._waypoint = to or before

    def _waypoint_behind(self, before: Waypoint, here: Bounds | None, text: bytes) -> Waypoint:
        """Where the answer is, with this text behind a place: what counts of a string is what closes it."""
        string = before.string
        if here is None:
            text = before.text + text
        else:
            string, text = before.number, text[text.index(QUOTE) :]
        now = None if self._string is None else self._string.here
        if now is not None:
            text = text[: text.rindex(QUOTE) + 1]
        return self._paths.waypoint(string, text, now)

    def _forced_text(self) -> bytes:
        tokens = self._vocabulary.tokens
        return b"".join([tokens[token_id] for token_id in self.forced])

    def _situation(self, match_s: float) -> Situation | None:
        """What is known here, right behind a token."""
        if self.excess:
            return None
        mask = self._next_mask()
        return self._paths.seen(
            Situation(
                self._forced_text(),
                tuple(self.forced),
                self._has_ended,
                self._held,
                self._is_open,
                mask.copy() if mask is self._own_mask else mask,
                None if self._string is None else self._string.state(),
                match_s,
            )
        )

    def _enter(self, situation: Situation, token: bytes) -> None:
        """Go behind a token to where others have been."""
        text, forced, self._has_ended, self._held, self._is_open, self._mask, string, match_s = situation
        if token or text:
            self._library.leave_out(token + text, match_s)
        self.forced.extend(forced)
        self._has_mask = True
        if self._string is not None:
            self._string.go_back(string)

    # --- going back

    def state(self) -> tuple:
        """What `go_back` needs to come back here."""
        string = None if self._string is None else self._string.state()
        mask = self._mask if self._has_mask and self._mask is not self._own_mask else None
        where = self._has_ended, self._held, self._is_open, self._waypoint, mask
        return self._library.state(), string, tuple(self.forced), where

    def go_back(self, state: tuple) -> None:
        """Forget everything since `state` was given."""
        library, string, forced, where = state
        self._has_ended, self._held, self._is_open, self._waypoint, mask = where
        if self._library.go_back(library):
            self._mask, self._has_mask = mask, mask is not None
        if self._string is not None:
            self._string.go_back(string)
        self.forced.clear()
        self.forced.extend(forced)

    # --- what is forced, and what may come next

    def _settle(self) -> None:
        """Go on over all that is forced now, and work out the mask of what comes then."""
        self._held = None
        # Within most texts nothing is forced for long, and the mask, needed anyway, shows it.
        if self._is_open and self._allows_witnesses():
            self._learn()
            return
        self._is_open = False
        text = self._library.forced_text()
        if text:
            token_ids = self._vocabulary.canonical(text) if len(text) <= MAX_FORCED_BYTES else ()
            if not token_ids:
                return
            *head, last = token_ids
            self._accept(head)
            longer = self._vocabulary.longer(last)
            if len(longer) and allows(self._next_mask(), longer):
                self._held = last
                self._mask = self._mask & self._held_or_longer()
                return
            self._accept([last])
        self._is_open = self._allows_witnesses()
        if self._is_open:
            self._learn()
        elif self._is_at_end():
            self._has_ended = True
            self.forced.extend(self._end_ids[:1])

    def _held_or_longer(self) -> np.ndarray:
        assert self._held is not None
        longer = self._vocabulary.longer(self._held)
        return only(len(self._vocabulary.tokens), np.append(longer, self._held))

    def _allows_witnesses(self) -> bool:
        """Whether two tokens may come next that begin differently, so that no text is forced."""
        witnesses = self._vocabulary.witnesses
        if witnesses is None:
            return False
        mask, (a, b) = self._next_mask(), witnesses
        return bool(mask.item(a >> 5) >> (a & 31) & mask.item(b >> 5) >> (b & 31) & 1)

    def _accept(self, token_ids: list[int]) -> None:
        """Go on over forced tokens."""
        if token_ids:
            tokens = self._vocabulary.tokens
            text = b"".join([tokens[token_id] for token_id in token_ids])
            self._library.accept_text(text)
            self._went_on(text)
            self.forced.extend(token_ids)

    def _accept_in_grammar(self, token_id: int) -> None:
        self._library.accept_token(token_id)
        self._went_on(self._vocabulary.tokens[token_id])

    def _learn(self) -> None:
        if self._string is not None:
            self._string.learn(self._library.handle, self._next_mask())

    def _went_on(self, text: bytes) -> None:
        self._has_mask = False
        if self._string is not None:
            self._string.saw(text)

    def _is_at_end(self) -> bool:
        """Whether nothing but the end is allowed."""
        mask = self._next_mask()
        if not self._may_end:
            return False
        rest = mask.copy()
        forbid(rest, self._end_ids)
        return not rest.any()

    def _next_mask(self) -> np.ndarray:
        """What may come behind all that is forced; overwritten when the answer goes on."""
        if not self._has_mask:
            self._has_mask = True
            self._may_end = False
            mask, string = None, self._string
            if string is not None:
                if not string.is_known:
                    self._library.catch_up()
                mask = string.mask(self._library.handle, self._own_mask)
            if mask is None:
                mask = self._own_mask
                self._library.fill(self._library_mask)
                self._may_end = bool(mask.item(self._stop_id >> 5) >> (self._stop_id & 31) & 1)
                if not self._end_ids:
                    forbid(mask, [self._stop_id])
            self._mask = mask if self._held is None else mask & self._held_or_longer()
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
