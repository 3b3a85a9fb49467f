"""Steps that run while the next one is planned: what that may count on, and when it has to wait."""

from __future__ import annotations

from collections.abc import Iterable

from engine.scheduling.request import Request
from engine.scheduling.settings import SchedulerSettings
from engine.scheduling.step_plan import StepPlan


class StepsUnderWay:
    """Plans that were made and whose results are not booked; one, and a second while it is made and launched.

    What a plan computes and draws counts from its beginning: the next one starts behind it, with a token of
    which only the device knows which one it is. Values are not needed for that, nor is the end of an
    answer that has all its tokens. A stop token is found a step late: the row behind it is thrown away.
    Whatever depends on values waits for them, the prefix tree and usage among it.

    What a constraint allows behind the last token is asked for when that is known, and the model has been
    launched on it by then. Where the constraint forces text behind it, the row has drawn too early: it is
    overtaken, and thrown away too, and its token is computed again with what is forced.

    Blocks of a request that ends meanwhile are given back at once: whoever gets them computes later than
    the row that still writes to them, for the device runs steps in order.
    """

    def __init__(self, settings: SchedulerSettings) -> None:
        self._runs_ahead = settings.runs_ahead and not settings.max_step_drafts
        self._plans: list[StepPlan] = []

    def __bool__(self) -> bool:
        return bool(self._plans)

    @property
    def can_be_followed(self) -> bool:
        """Whether all that a plan needs to know of the last step is that there will be tokens. One that is
        forced is not drawn: a row ahead would find none."""
        return self._runs_ahead and not any(row.forced for row in self._plans[-1].rows)

    def begin(self, plan: StepPlan) -> None:
        for row in plan.rows:
            row.request.num_computed += row.num_tokens - row.num_drafts
            row.request.num_drawn += row.samples
        self._plans.append(plan)

    def end(self, plan: StepPlan) -> None:
        """Steps end in order. Their rows are booked, or their requests ended, by the caller."""
        first = self._plans.pop(0)
        assert first is plan, "steps end in the order in which they began"

    def drop_overtaken(self) -> None:
        """Of the steps that run on, the rows of requests of which more is known by now."""
        for plan in self._plans:
            for row in plan.rows:
                request, end = row.request, row.start + row.num_tokens
                if row.is_ahead and row.samples and request.matcher is not None and request.num_known > end:
                    row.is_overtaken = True
                    request.num_computed -= row.num_tokens
                    request.num_drawn -= 1

    def going_on(self, running: Iterable[Request]) -> list[Request]:
        """Requests that get more tokens than those which are being drawn."""
        if not self._plans:
            return list(running)
        return [r for r in running if not r.num_drawn or r.num_known + r.num_drawn < r.max_known]
