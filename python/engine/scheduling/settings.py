"""What the scheduler is told: every value resolved, nothing left to decide."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Places:
    """How many requests are let in; each choice of a request counts.

    `max_queued_requests` counts beyond those that run; 0 means that nobody waits for a running
    slot. `max_queued_tokens` counts the prompts of those that wait; None for no limit.
    """

    max_running_requests: int
    max_queued_requests: int
    max_queued_tokens: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerSettings(Places):
    """Units: lengths and sizes are in tokens.

    `target_itl_s` bounds the predicted time of a step that decodes, by giving less of it to prefill;
    None for no bound.
    """

    context_length: int
    vocab_size: int
    chunked_prefill_size: int
    target_itl_s: float | None = None
    schedule_policy: str = "fcfs"
    eos_token_ids: tuple[int, ...] = ()
    max_step_drafts: int = 0
    """Most guessed tokens computed in a step; 0: no speculative decoding."""

    jump_forward: bool = True
    """Whether forced tokens of constrained answers are computed together with the next sampled one."""

    scores_known_tokens: bool = True
    """Whether a known token is given the log-probability that it would have if it were drawn."""

    runs_ahead: bool = False
    """Whether a step is planned before the tokens of the one before it are known, where that can be."""

    debug_checks: bool = False
