"""One choice of one request, as the scheduler and the runner see it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from engine.core.messages import AdapterRef
from engine.sampling.params import SamplingParams
from engine.scheduling.matcher import Matcher
from engine.scheduling.prompt_lookup import PromptLookup


@dataclasses.dataclass(eq=False, slots=True)
class Request:
    """State of one choice. Known tokens = prompt + output; computed tokens catch up with them.

    The runner and the sampler read the first group of fields and the properties; everything else
    belongs to the scheduler.

    Shapes: `token_ids` int32, capacity for prompt + most output tokens; the first `num_known`
    are valid. `block_table` int32 capacity [ceil(capacity / block_size)]; the first `num_blocks`
    are valid, and position p lives in slot block_table[p // block_size] * block_size + p % block_size.
    """

    request_id: str
    choice: int
    params: SamplingParams
    seed: int
    namespace: str
    token_ids: np.ndarray
    block_table: np.ndarray
    prompt_len: int
    num_known: int
    max_known: int
    """num_known at which generation ends with "length"."""
    arrival: int
    """Logical clock: order of arrival, unique."""
    priority: int = 0
    """Higher ones are admitted first."""
    client: str = ""
    """Who asks: running slots are shared between clients, by weight."""
    weight: float = 1.0
    trace_id: str = ""
    """What the client calls it."""
    runs_alone: bool = False
    """No step computes it together with another request."""
    adapter_ref: AdapterRef | None = None
    adapter: Any = None
    """Its place among the adapters (see `adapter_queue`), with the weights; None for the base model."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end generation: those of `params`, and the model's unless eos is ignored."""
    num_to_score: int = 0
    """Where the positions end whose next token, known already, gets a log-probability."""
    num_scored: int = 0
    """Where they begin; what is computed again after a preemption is not scored again."""
    num_computed: int = 0
    """Known tokens, and one that is being drawn, that a step has computed or computes now."""
    num_drawn: int = 0
    """Tokens behind the known ones that steps which run now draw."""
    num_blocks: int = 0
    lookup: PromptLookup | None = None
    """Guesses what comes next; None before there was anything to guess."""
    look_from: int = 0
    """Known tokens before which `lookup` finds nothing; see there."""
    matcher: Matcher | None = None
    """The constraint on the output."""

    num_sent: int = 0
    """Known tokens that need not be handed out any more; the prompt is among them."""
    finish_reason: str | None = None
    """Why there will be no further token; log-probabilities of known ones may still be missing."""
    stop_token_id: int | None = None
    num_cached: int | None = None
    """Prompt tokens that were cached when this choice started for the first time; None before that."""
    node: int | None = None
    """Locked radix node covering the blocks that are in the tree."""
    num_shared: int = 0
    """Leading blocks that are in the tree, held by the lock on `node`; the others are held by reference."""
    is_started: bool = False
    """Has computed something, or may, since it was last admitted: it waits for nobody's block."""
    was_admitted: bool = False
    awaited: Request | None = None
    """The request that is computing this one's next block."""
    block_keys: list[int] = dataclasses.field(default_factory=list)
    """Chain hashes of the leading full blocks of known tokens, as far as they were needed."""
    claimed: range = range(0)
    """Blocks that this request has announced to compute and has not computed yet."""
    num_preemptions: int = 0

    @property
    def num_output(self) -> int:
        return self.num_known - self.prompt_len

    @property
    def is_decoding(self) -> bool:
        """Whether the whole prompt is computed."""
        return self.is_started and self.num_computed >= self.prompt_len

    @property
    def is_scoring(self) -> bool:
        """Whether prompt positions must still be computed here, because cached ones have no logits."""
        return self.num_scored < self.num_to_score

    @property
    def asks_for_nothing(self) -> bool:
        """Whether it is finished before it has begun: `max_tokens` is 0, and no prompt to be scored."""
        return self.has_nothing_to_do and not self.num_output

    @property
    def has_nothing_to_do(self) -> bool:
        return self.finish_reason is not None and not self.is_scoring

    @property
    def num_matchable(self) -> int:
        """Known tokens that may come from the cache."""
        return self.num_scored if self.is_scoring else self.num_known - 1

    @property
    def is_next_forced(self) -> bool:
        """Whether the next token is known already: nothing has to be drawn, unless it is to be scored too."""
        has_forced = self.matcher is not None and len(self.matcher.forced) > self.num_drawn
        return has_forced and self.finish_reason is None and self.params.logprobs is None

    def take_forced(self) -> int:
        assert self.matcher is not None
        return self.matcher.forced.popleft()

    def banned_behind(self, num_known: int) -> frozenset[int] | None:
        """Tokens that must not follow `num_known` tokens, for `min_tokens` is not reached; None for none."""
        if num_known - self.prompt_len < self.params.min_tokens and self.stop_ids:
            return self.stop_ids
        return None


def with_room(prompt: np.ndarray, capacity: int) -> np.ndarray:
    """The token ids of a prompt, with room behind them for output: int32 [capacity]."""
    token_ids = np.empty(capacity, np.int32)
    token_ids[: len(prompt)] = prompt
    return token_ids
