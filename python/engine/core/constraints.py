"""Requests whose constraint is being compiled, and the matchers of those that run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from engine.core.messages import GenerateRequest
from engine.errors import EngineError, InternalError, InvalidRequest, Overloaded
from engine.grammar.channel_budget import BoundedThoughts
from engine.grammar.compiler import CompiledGrammar, GrammarCompiler
from engine.grammar.errors import GrammarError
from engine.grammar.guarded import GuardedMatcher
from engine.grammar.matcher import ConstraintMatcher
from engine.grammar.thinking import ThinkingMatcher
from engine.log import request_name
from engine.sampling.constraint import Constraint, Thinking, ThoughtMessages
from engine.sampling.params import SamplingParams

if TYPE_CHECKING:
    from engine.grammar.matcher import AnyMatcher

logger = logging.getLogger(__name__)
MATCHER_FAILED = "The engine failed while it applied the constraint on this answer."


class ConstrainedRequests:
    """Holds requests back until their grammar is there. At most `max_waiting` of them.

    Choices that are cancelled meanwhile are remembered, and given back with the request.
    """

    def __init__(self, compiler: GrammarCompiler, max_waiting: int) -> None:
        self._compiler = compiler
        self._max_waiting = max_waiting
        self._waiting: dict[str, GenerateRequest] = {}
        self._cancelled: dict[str, set[int]] = {}

    @property
    def wake_fd(self) -> int:
        """Readable when `take_ready` has something to give."""
        return self._compiler.wake_fd

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def waiting(self) -> Iterable[GenerateRequest]:
        """Those whose constraint is being compiled."""
        return self._waiting.values()

    def warm_up(self) -> None:
        """Start what compiles before somebody waits for it."""
        self._compiler.warm_up()

    def held(self, client: str) -> tuple[int, int]:
        """Choices of a client whose constraint is being compiled, and tokens of their prompts."""
        own = [request for request in self._waiting.values() if request.client == client]
        return sum(request.n for request in own), sum(len(request.prompt) // 4 for request in own)

    def find(self, request: GenerateRequest) -> CompiledGrammar | None:
        """The grammar of a constrained request; None when it has to be compiled."""
        return self._compiler.find(_constraint(request))

    def hold(self, request: GenerateRequest) -> None:
        """Have its grammar compiled; `take_ready` gives it back.

        Raises: `InvalidRequest` when its id is in use, `Overloaded` when too many wait.
        """
        if request.request_id in self._waiting:
            raise InvalidRequest(f"Invalid request: the request id {request.request_id!r} is in use")
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded("The request queue is full.", slug="queue_full")
        self._waiting[request.request_id] = request
        self._compiler.start(_constraint(request))

    def cancel(self, request_id: str) -> None:
        """Forget a request; unknown ids are ignored."""
        request = self._waiting.pop(request_id, None)
        self._cancelled.pop(request_id, None)
        if request is not None:
            self._compiler.forget(_constraint(request))

    def cancel_choice(self, request_id: str, choice: int) -> None:
        if request_id in self._waiting:
            self._cancelled.setdefault(request_id, set()).add(choice)

    def take_ready(self) -> Iterator[tuple[GenerateRequest, CompiledGrammar | EngineError, set[int]]]:
        """Requests that wait no longer, with their grammar or what is wrong, and their cancelled choices."""
        results = self._compiler.take_results()
        if not results:
            return
        for request in list(self._waiting.values()):
            result = results.get(_constraint(request).key)
            if result is not None:
                del self._waiting[request.request_id]
                mine = refused(request.params, str(result)) if isinstance(result, GrammarError) else result
                yield request, mine, self._cancelled.pop(request.request_id, set())

    def close(self) -> None:
        """Stop what compiles; those that wait are abandoned."""
        self._compiler.close()


def matcher_maker(
    request: GenerateRequest, grammar: CompiledGrammar | None
) -> Callable[[frozenset[int]], GuardedMatcher] | None:
    """What makes the matcher of each choice from its stop tokens; None if they need none.

    What is made fails alone. If it cannot even be made, `InternalError` is raised.
    """
    thinking = request.params.thinking
    if thinking is None and grammar is None:
        return None

    name = request_name(request.request_id, request.trace_id)

    def make(stop_ids: frozenset[int]) -> GuardedMatcher:
        try:
            return GuardedMatcher(_new_matcher(thinking, grammar, stop_ids), name)
        except Exception:
            logger.exception("no matcher can be made for %s", name)
            raise InternalError(MATCHER_FAILED) from None

    return make


def _new_matcher(
    thinking: Thinking | ThoughtMessages | None, grammar: CompiledGrammar | None, stop_ids: frozenset[int]
) -> AnyMatcher:
    if grammar is None:
        assert isinstance(thinking, Thinking), "messages of thoughts are those of a constraint"
        return ThinkingMatcher(thinking, None)
    if isinstance(thinking, Thinking):
        spelled = () if thinking.start is None else grammar.vocabulary.spelled(thinking.start)
        return ThinkingMatcher(thinking, lambda: ConstraintMatcher(grammar, stop_ids), spelled)
    matcher = ConstraintMatcher(grammar, stop_ids)
    return matcher if thinking is None else BoundedThoughts(thinking, matcher, grammar.vocabulary)


def refused(params: SamplingParams, what: str) -> InvalidRequest:
    """Names the constraint as this request does: others may have the same under another name."""
    assert params.constraint is not None
    param = params.constraint.param
    return InvalidRequest(f"Invalid request: {param} {what}", param=param)


def _constraint(request: GenerateRequest) -> Constraint:
    constraint = request.params.constraint
    assert constraint is not None
    return constraint
