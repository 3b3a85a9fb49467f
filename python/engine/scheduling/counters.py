"""What the scheduler counts."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(slots=True)
class SchedulerCounters:
    """Running totals since the start."""

    num_steps: int = 0
    prompt_tokens_computed: int = 0
    prompt_tokens_cached: int = 0
    output_tokens: int = 0
    draft_tokens: int = 0
    """Tokens that were guessed and computed."""
    accepted_tokens: int = 0
    """Of these, those that were right."""
    num_preemptions: int = 0
