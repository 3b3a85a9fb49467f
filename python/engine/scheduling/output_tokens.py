"""How output tokens join their request: the sampled ones, those that a constraint forces, the last one."""

from __future__ import annotations

import dataclasses

from engine.scheduling.counters import SchedulerCounters
from engine.scheduling.request import Request
from engine.scheduling.settings import SchedulerSettings


@dataclasses.dataclass(slots=True)
class NewToken:
    """What a sampled row gave its request. `finish_reason` is "stop" or "length" when that was all.

    `token_ids` are the tokens that can be handed out now: the sampled one, which is at `sampled`, before
    it accepted drafts, and around it those that a constraint forces, unless their log-probabilities are
    still to come. It is
    empty when only the prompt was to be scored, and, with `finish_reason` "error", when no token was
    possible; `sampled` is None then.
    """

    request: Request
    token_ids: list[int]
    sampled: int | None = None
    finish_reason: str | None = None
    stop_token_id: int | None = None


class OutputTokens:
    """Appends tokens and says when a request is over, and why."""

    def __init__(self, settings: SchedulerSettings, counters: SchedulerCounters) -> None:
        self._settings = settings
        self._counters = counters

    def append(self, request: Request, token_id: int) -> NewToken:
        """Add what was sampled for a request; below 0 when no token was possible."""
        if request.finish_reason is not None:  # known tokens were scored, and that was all
            unsent = request.token_ids[request.num_sent : request.num_known].tolist()
            return NewToken(request, unsent, None, request.finish_reason, request.stop_token_id)
        if token_id < 0:  # no token is possible: the model's numbers are broken
            return NewToken(request, [], None, "error")
        position = request.num_known
        self._add_token(request, token_id)
        self.append_forced(request)
        first, last = request.num_sent, position + 1 if request.is_scoring else request.num_known
        request.num_sent = last
        new = NewToken(request, request.token_ids[first:last].tolist(), position - first)
        if request.has_nothing_to_do:
            new.finish_reason, new.stop_token_id = request.finish_reason, request.stop_token_id
        return new

    def append_forced(self, request: Request) -> None:
        """Add the tokens that the constraint forces now; they are computed with the next sampled one."""
        matcher, begin = request.matcher, request.num_known
        if request.num_known == request.max_known:
            request.finish_reason = request.finish_reason or "length"
        if matcher is None or not self._settings.jump_forward:
            return
        if request.params.logprobs is not None and not self._settings.scores_known_tokens:
            return
        while matcher.forced and request.finish_reason is None:
            self._add_token(request, matcher.forced.popleft())
        if request.params.logprobs is not None and request.num_known > begin:
            if not request.is_scoring:
                request.num_scored = begin - 1
            request.num_to_score = request.num_known - 1

    def _add_token(self, request: Request, token_id: int) -> None:
        request.token_ids[request.num_known] = token_id
        request.num_known += 1
        self._counters.output_tokens += 1
        is_over = request.matcher is not None and request.matcher.is_over
        if token_id in request.stop_ids and (is_over or request.num_output > request.params.min_tokens):
            request.finish_reason, request.stop_token_id = "stop", token_id
        elif is_over:
            request.finish_reason = "stop"
        elif request.num_known >= request.max_known:
            request.finish_reason = "length"
