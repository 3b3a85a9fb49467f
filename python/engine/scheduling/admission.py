"""Whether a request is let in: what it asks is possible, and there is a place for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

import numpy as np

from engine.errors import InvalidRequest, Overloaded
from engine.sampling.params import SamplingParams
from engine.scheduling.queued import Queued
from engine.scheduling.settings import Places, SchedulerSettings

Q = TypeVar("Q", bound=Queued)


@dataclasses.dataclass(frozen=True)
class Load:
    """What was let in before. Requests are counted by choice, the tokens of a prompt once for its choices."""

    num_running: int
    num_waiting: int
    num_waiting_tokens: int

    def without(self, waiting: Collection[Queued]) -> Load:
        """What is left when these go, of each request all choices."""
        num_tokens = sum(request.prompt_len for request in waiting if request.choice == 0)
        return Load(
            self.num_running, self.num_waiting - len(waiting), max(0, self.num_waiting_tokens - num_tokens)
        )


def max_known_tokens(
    prompt: np.ndarray, params: SamplingParams, settings: SchedulerSettings, pool_tokens: int
) -> int:
    """The number of tokens at which generation ends, prompt included.

    A request that passes can be run to its end when it is alone, so there is always progress.
    Raises: `InvalidRequest` with the numbers when prompt or limits cannot be served.
    """
    prompt_len = len(prompt)
    if prompt_len == 0:
        raise InvalidRequest("Invalid request: the prompt is empty", param="prompt")
    context_length = min(settings.context_length, pool_tokens)
    # Without a limit of its own there must be room for one token.
    check_prompt_len(prompt_len, context_length - (params.max_tokens is None), context_length)
    _check_token_ids(prompt, params, settings.vocab_size)
    if params.max_tokens is None:
        limit = context_length
    else:
        limit = prompt_len + params.max_tokens
        if limit > context_length:
            _too_long(
                f"the prompt has {prompt_len} tokens and max_tokens is {params.max_tokens}, "
                f"together {limit}, but the context length is {context_length}",
                "max_tokens",
            )
    if prompt_len + params.min_tokens > limit:
        raise InvalidRequest(
            f"Invalid request: min_tokens is {params.min_tokens}, but at most "
            f"{limit - prompt_len} tokens can be generated",
            param="min_tokens",
        )
    return limit


def check_prompt_len(prompt_len: int, most: int, context_length: int | None = None) -> None:
    """Raises: `InvalidRequest` when the prompt is longer than `most`."""
    if prompt_len > most:
        shown = most if context_length is None else context_length
        _too_long(f"the prompt has {prompt_len} tokens, but the context length is {shown}", "prompt")


def _check_token_ids(prompt: np.ndarray, params: SamplingParams, vocab_size: int) -> None:
    lowest, highest = int(prompt.min()), int(prompt.max())
    for param, token_ids in (
        ("prompt", (lowest, highest)),
        ("stop_token_ids", params.stop_token_ids),
        ("logit_bias", params.logit_bias),
    ):
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                raise InvalidRequest(
                    f"Invalid request: {param} has the token id {token_id}, "
                    f"but the vocabulary has ids 0 to {vocab_size - 1}",
                    param=param,
                )


def check_place(n: int, prompt_len: int, load: Load, places: Places) -> None:
    """Let n choices of a prompt in: into free running slots, or else into the queue.

    Raises: `InvalidRequest` when there never is so much place, `Overloaded` when there is none now.
    """
    num_places = places.max_running_requests + places.max_queued_requests
    check_choices(n, num_places)
    num_live = load.num_running + load.num_waiting + n
    if num_live > num_places:
        raise Overloaded("The request queue is full.", slug="queue_full")
    most = places.max_queued_tokens
    waits = num_live > places.max_running_requests
    if waits and most is not None and load.num_waiting_tokens + prompt_len > most:
        raise Overloaded("The request queue holds too many tokens.", slug="queue_full")


def make_room(check: Callable[[list[Q]], None], groups: Iterator[Collection[Q]]) -> list[Q]:
    """Who of `groups` must go, taken group by group, until `check` of them raises no `Overloaded`.

    Raises: `Overloaded` when that does not help, and what else `check` raises.
    """
    gone: list[Q] = []
    while True:
        try:
            check(gone)
            return gone
        except Overloaded:
            group = next(groups, None)
            if group is None:
                raise
            gone += group


def displaced_error() -> Overloaded:
    """What those who made room are told."""
    return Overloaded("The request queue is full, and others wait for their share of it.")


def check_choices(n: int, places: int) -> None:
    """Raises: `InvalidRequest` when n choices can never run and wait in `places` together."""
    if n < 1:
        raise InvalidRequest(f"Invalid request: n must be at least 1, got {n}", param="n")
    if n > places:
        raise InvalidRequest(
            f"Invalid request: n is {n}, but at most {places} choices can be served at once", param="n"
        )


def _too_long(what: str, param: str) -> None:
    raise InvalidRequest(f"Invalid request: {what}", slug="context_length_exceeded", param=param)
