"""Log-probabilities of tokens that are known before they are computed, for the requests that ask for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch

from engine.ops.transfer import fetch, send
from engine.sampling.logprobs_mode import floored, reports_logits
from engine.scheduling.step_plan import StepRow, TokenScores


class TokenScorer:
    """Scores the known tokens of a step, of prompts or of forced text, `max_rows` rows of logits at a time.

    Logits of a whole chunk of prompt would take hundreds of megabytes with a large vocabulary;
    `project` makes them from hidden rows, in memory that is used again for the next rows.
    """

    def __init__(
        self,
        ops: ModuleType,
        ctx: Any,
        project: Callable[[torch.Tensor, int], torch.Tensor],
        max_rows: int,
        *,
        vocab_size: int,
        logprobs_mode: str,
    ) -> None:
        self._ops, self._ctx, self._project, self._max_rows = ops, ctx, project, max_rows
        self._vocab_size = vocab_size
        self._reports_logits = reports_logits(logprobs_mode)

    def launch(
        self, hidden: torch.Tensor, rows: Sequence[StepRow], first_row: int
    ) -> Callable[[], list[TokenScores]]:
        """Start to score `rows`; what waits for one entry for each. `hidden` holds their scored positions one
        after the other, `first_row` is the number of the first among the step's rows."""
        device = hidden.device
        num_top = [min(_num_top(row), self._vocab_size) for row in rows]
        counts = [len(row.scored) for row in rows]
        num_top_of_each = np.repeat(np.array(num_top, np.int32), counts)
        token_ids, num_top_of_each = send(
            [np.concatenate([_next_tokens(row) for row in rows]), num_top_of_each], device
        )
        logprobs = torch.empty(len(hidden), device=device)
        top_ids = torch.empty(len(hidden), max(num_top), dtype=torch.int32, device=device)
        top_logprobs = torch.empty(len(hidden), max(num_top), device=device)
        for begin in range(0, len(hidden), self._max_rows):
            part = slice(begin, begin + self._max_rows)
            self._ops.score_tokens(
                self._ctx,
                self._project(hidden[part], first_row + begin),
                token_ids[part],
                num_top_of_each[part],
                logprobs[part],
                top_ids[part],
                top_logprobs[part],
                self._reports_logits,
            )
        fetched = fetch([logprobs, top_ids, top_logprobs])

        def wait() -> list[TokenScores]:
            logprobs, top_ids, top_logprobs = fetched()
            ends = np.cumsum(counts)
            parts = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
            return [
                TokenScores(floored(logprobs[own]), top_ids[own, :most], floored(top_logprobs[own, :most]))
                for own, most in zip(parts, num_top, strict=True)
            ]

        return wait


def _next_tokens(row: StepRow) -> np.ndarray:
    """The known tokens after the scored positions."""
    return row.request.token_ids[row.scored.start + 1 : row.scored.stop + 1]


def _num_top(row: StepRow) -> int:
    """Alternatives asked for, of the prompt or of the output."""
    params = row.request.params
    return max(params.prompt_logprobs or 0, params.logprobs or 0)
