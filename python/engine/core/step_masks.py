"""What constraints allow the draws of a step, and how they hear of what was drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from engine.grammar.look_ahead import masks_behind
from engine.grammar.matcher import MatcherBatch
from engine.scheduling.step_plan import StepPlan, StepRow

if TYPE_CHECKING:
    from engine.scheduling.matcher import Matcher


class StepMasks:
    """The matchers of a step's requests, asked before it is computed and told after. `max_rows` bounds
    the requests of a step."""

    def __init__(self, max_rows: int, vocab_size: int) -> None:
        self._matchers = MatcherBatch(max_rows, vocab_size)

    def fill(self, plan: StepPlan) -> None:
        """Write the plan's bitmask. Drafts that a constraint refuses, or overtakes, are cut off."""
        rows = plan.sampled_rows
        plan.bitmask = masks = self._matchers.fill(list(map(_matcher_of, rows)))
        if masks is None or not any(row.num_drafts for row in rows):
            return
        spread: list[np.ndarray] = []
        for row, mask in zip(rows, masks, strict=True):
            spread.append(mask)
            if row.request.matcher is None:
                spread += [mask] * row.num_drafts
            elif row.num_drafts:
                behind = masks_behind(row.request.matcher, mask, row.drafts.tolist())
                row.cut_drafts(len(behind))
                spread += behind
        plan.bitmask = np.stack(spread)

    def advance(self, plan: StepPlan, token_ids: list[int]) -> None:
        """Tell the matchers what was drawn, accepted drafts first."""
        if plan.bitmask is None:
            return
        rows = plan.sampled_rows
        if len(token_ids) == len(rows):
            self._matchers.advance(list(map(_matcher_of, rows)), token_ids)
            return
        first, drawn = 0, []
        for row in rows:
            drawn.append((_matcher_of(row), token_ids[first : first + row.num_accepted + 1]))
            first += 1 + row.num_drafts
        for index in range(max(len(ids) for _, ids in drawn)):
            now = [(matcher, ids[index]) for matcher, ids in drawn if index < len(ids)]
            self._matchers.advance(*zip(*now, strict=True))


def _matcher_of(row: StepRow) -> Matcher | None:
    """None, too, where the constraint is beyond the row, whatever that draws."""
    return None if row.is_overtaken else row.request.matcher
