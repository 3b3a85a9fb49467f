"""One choice of one request, as the scheduler and the runner see it."""

from __future__ import annotations

import dataclasses

import numpy as np

from engine.sampling.params import SamplingParams


@dataclasses.dataclass(eq=False, slots=True)
class Request:
    """State of one choice. Known tokens = prompt + output; computed tokens catch up with them.

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
    num_computed: int = 0
    num_blocks: int = 0
    num_cached: int = 0
    """Prompt tokens that were found in the prefix cache at first admission."""
    node: int | None = None
    """Locked radix node covering the blocks that are in the tree."""
    num_preemptions: int = 0

    @property
    def num_output(self) -> int:
        return self.num_known - self.prompt_len
