"""A device that computes behind the back of the host: what it draws is known when somebody waits for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from engine.scheduling.request import Request
from engine.scheduling.step_plan import StepPlan, StepResult, StepRow, Wait

UNKNOWN = -77_777
"""Where a token id is that the host cannot know yet."""


class LateDevice:
    """Runs the steps of `runner` in the order in which they are launched, as late as can be.

    A step is computed when its result, or a later one's, is waited for, from copies of what its plan
    held when it was launched: by then the scheduler has given blocks away and planned on. A row that is
    ahead gets its token from the step before, the only place where it is.
    """

    def __init__(self, runner) -> None:
        self._runner = runner
        self._queue: list[tuple[StepPlan, dict[Request, Request]]] = []
        self._results: dict[int, StepResult | Exception] = {}
        self._last: dict[Request, int] | None = {}
        self._num_launched = 0
        self.num_computed = 0
        self.num_overlapped = 0
        """Steps that were waited for when the next one had been launched."""
        self.num_late_rows = 0
        self.num_late_masks = 0
        """Steps whose masks were there only when the model had been launched."""
        self.broken: Exception | None = None
        """What went wrong, and was not asked for: the engine would take that for a step that failed."""
        self.lose_next: Exception | None = None
        """Raised when the step that is launched next is waited for."""
        self.refuse_next: Exception | None = None
        """Raised when the next step is launched."""
        self._lost: dict[int, Exception] = {}

    def __getattr__(self, name: str):
        return getattr(self._runner, name)

    def launch(self, plan: StepPlan, before_draws: Callable[[], None] | None = None) -> Wait:
        if self.refuse_next is not None:
            error, self.refuse_next = self.refuse_next, None
            raise error
        copies = {row.request: _copied(row) for row in plan.rows}
        rows = [dataclasses.replace(row, request=copies[row.request]) for row in plan.rows]
        self._queue.append((dataclasses.replace(plan, rows=rows), copies))
        number, self._num_launched = self._num_launched, self._num_launched + 1
        if self.lose_next is not None:
            self._lost[number], self.lose_next = self.lose_next, None
        queued = self._queue[-1][0]
        if before_draws is not None:
            self.num_late_masks += 1
            before_draws()
            assert [plan for plan, _ in self._queue] == [queued], "those before are settled, and only they"
        queued.bitmask = None if plan.bitmask is None else plan.bitmask.copy()

        def wait() -> StepResult:
            self.num_overlapped += self._num_launched > number + 1
            while self.num_computed <= number:
                self._compute()
            result = self._results.pop(number)
            if isinstance(result, Exception):
                raise result
            return result

        return wait

    def _compute(self) -> None:
        plan, copies = self._queue.pop(0)
        number, self.num_computed = self.num_computed, self.num_computed + 1
        try:
            self._fill_in(plan, copies)
            self._last = None
            if number in self._lost:
                raise self._lost[number]
            result = self._runner.launch(plan)()
        except Exception as error:
            if number not in self._lost:
                self.broken = error
            self._results[number] = error
            return
        self._results[number], self._last = result, {}
        drawn = iter(result.token_ids.tolist())
        for request, row in zip(copies, plan.rows, strict=True):
            if row.samples and not row.num_drafts:
                self._last[request] = next(drawn)
            else:
                for _ in range(row.num_draws):
                    next(drawn)

    def _fill_in(self, plan: StepPlan, copies: dict[Request, Request]) -> None:
        """Give rows that are ahead the token that the step before drew, if that did not fail."""
        for request, row in zip(copies, plan.rows, strict=True):
            if row.is_ahead:
                assert row.num_tokens == 1 and row.request.token_ids[row.start] == UNKNOWN
                is_lost = self._last is None  # whoever it was drawn for has failed
                row.request.token_ids[row.start] = 0 if is_lost else max(0, self._last[request])
                row.request.num_known += 1
                row.is_ahead = False
                self.num_late_rows += 1


def _copied(row: StepRow) -> Request:
    """What of a request a launch reads: known tokens and where they lie."""
    request = row.request
    token_ids = np.full_like(request.token_ids, UNKNOWN)
    known = request.num_known + row.num_drafts
    token_ids[:known] = request.token_ids[:known]
    table = np.full_like(request.block_table, UNKNOWN)
    table[: request.num_blocks] = request.block_table[: request.num_blocks]
    return dataclasses.replace(request, token_ids=token_ids, block_table=table)
