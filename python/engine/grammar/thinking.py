"""Thoughts before an answer: where they end, and when they have to."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from engine.grammar.matcher import ConstraintMatcher
from engine.grammar.vocabulary import allow, allow_only, forbid
from engine.sampling.constraint import Thinking
from engine.text.formats.reader import Stage
from engine.text.formats.tag_tokens import TagTokens


class ThinkingMatcher:
    """An answer behind thoughts, with a constraint of its own or without. Stands in for its matcher.

    As long as thoughts may begin, the answer has: what is blank may come before either. If they do begin, the
    answer starts afresh behind them, from a matcher that `make_answer` makes.

    The constraint's first forced tokens wait until the thoughts are over. What closes thoughts that took
    too long comes before them, as forced tokens too.

    Where no thoughts may begin, an answer that is forced to begin with the text of their tag has it in the
    tokens `spelled`, for the tag's own token would begin thoughts.
    """

    __slots__ = (
        "_answer",
        "_forced",
        "_has_answer_begun",
        "_make_answer",
        "_spelled",
        "_thinking",
        "_tokens",
    )

    def __init__(
        self,
        thinking: Thinking,
        make_answer: Callable[[], ConstraintMatcher] | None,
        spelled: Sequence[int] = (),
    ) -> None:
        self._thinking, self._make_answer, self._spelled = thinking, make_answer, spelled
        self._answer = None if make_answer is None else make_answer()
        self._has_answer_begun = False
        self._forced: deque[int] = deque()
        self._tokens = TagTokens(thinking.start, thinking.end, np.frombuffer(thinking.blank, "<i4"))
        self._close_if_used_up()
        self._spell_tag()

    @property
    def forced(self) -> deque[int]:
        """Tokens that must come next."""
        if self._tokens.stage is Stage.ANSWERING and self._answer is not None:
            return self._answer.forced
        return self._forced

    @property
    def is_over(self) -> bool:
        """Whether the answer is complete, and nothing may follow."""
        if self._answer is None or not self._answer.is_over:
            return False
        return self._tokens.stage is Stage.ANSWERING or self._has_answer_begun

    @property
    def excess(self) -> str:
        """What matching takes too much of; nothing as a rule."""
        return "" if self._answer is None else self._answer.excess

    def mask(self, row: np.ndarray) -> np.ndarray:
        """The bitmask of the next token, int32 [ceil(V / 32)]: `row`, overwritten, or an array that must
        not be written to."""
        stage, answer = self._tokens.stage, self._answer
        if stage is Stage.ANSWERING and answer is not None:
            return answer.mask(row)
        row[:] = -1
        if stage is Stage.THINKING:
            if answer is not None:
                answer.forbid_end(row)
        elif answer is not None:
            row[:] = answer.mask(row)
        elif self._forced:
            allow_only(row, self._forced[0])
        if stage is Stage.UNDECIDED:
            assert self._thinking.start is not None
            if self._may_think:
                allow(row, self._thinking.start)
            else:
                forbid(row, [self._thinking.start])
        return row

    def take(self, token_id: int) -> None:
        """Go on behind a token that was drawn."""
        tokens = self._tokens
        if tokens.stage is not Stage.ANSWERING:
            num_thoughts = tokens.num_thoughts
            tokens.see(token_id)
            if tokens.num_thoughts > num_thoughts:
                if self._has_answer_begun and self._make_answer is not None:
                    self._answer, self._has_answer_begun = self._make_answer(), False
                self._close_if_used_up()
                return
        if self._answer is not None:
            self._answer.take(token_id)
            self._has_answer_begun = True
            self._spell_tag()
        elif self._forced:
            self._forced.popleft()

    def state(self) -> tuple:
        """What `go_back` needs to come back here."""
        answer = None if self._answer is None else self._answer.state()
        return self._answer, answer, self._has_answer_begun, self._tokens.state(), tuple(self._forced)

    def go_back(self, state: tuple) -> None:
        """Forget everything since `state` was given."""
        self._answer, answer, self._has_answer_begun, tokens, forced = state
        if self._answer is not None:
            self._answer.go_back(answer)
        self._tokens.go_back(tokens)
        self._forced.clear()
        self._forced.extend(forced)

    @property
    def _may_think(self) -> bool:
        budget = self._thinking.budget
        return budget is None or budget > len(self._thinking.closing)

    def _spell_tag(self) -> None:
        if self._answer is None or self._tokens.stage is not Stage.UNDECIDED or self._may_think:
            return
        forced = self._answer.forced
        if forced and forced[0] == self._thinking.start and self._spelled:
            forced.popleft()
            forced.extendleft(reversed(self._spelled))

    def _close_if_used_up(self) -> None:
        budget, closing, tokens = self._thinking.budget, self._thinking.closing, self._tokens
        is_thinking = tokens.stage is Stage.THINKING
        if is_thinking and budget is not None and tokens.num_thoughts + len(closing) >= budget:
            tokens.stage = Stage.ANSWERING
            self.forced.extendleft(reversed(closing))
