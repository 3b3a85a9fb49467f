"""Speculative decoding: which guesses a step computes together with what is known."""

from __future__ import annotations

from collections.abc import Iterable

from engine.scheduling.counters import SchedulerCounters
from engine.scheduling.prompt_lookup import MORE_BESIDE, MOST_BESIDE, PromptLookup
from engine.scheduling.request import Request
from engine.scheduling.request_blocks import RequestBlocks
from engine.scheduling.settings import SchedulerSettings
from engine.scheduling.step_plan import StepRow

MAX_DRAFTS = 15
"""Most drafts of one row."""


class Drafts:
    """Lets the rows of decoding requests go on with guesses, from what a step has left.

    A draft never ends its answer: it is no stop token, and leaves room for the token drawn behind it. So
    the tokens that are accepted can be booked at once, and the last one drawn like any other.
    """

    def __init__(
        self, settings: SchedulerSettings, blocks: RequestBlocks, block_size: int, counters: SchedulerCounters
    ) -> None:
        self._most = settings.max_step_drafts
        self._blocks = blocks
        self._block_size = block_size
        self._counters = counters

    def add(self, rows: Iterable[StepRow], num_running: int, budget: int) -> int:
        """Put drafts behind rows that sample, at most `budget` in all; how many.

        Blocks are taken only as long as one is left for each running request: no guess is worth one
        that a known token needs.
        """
        left = min(budget, self._most)
        if left <= 0:
            return 0
        sampled = [row for row in rows if row.samples]
        num_beside = min(len(sampled) - 1, MOST_BESIDE)
        more = num_beside * MORE_BESIDE
        due = [row for row in sampled if row.request.num_known >= row.request.look_from + more]
        guesses = [(row, guess) for row in due if (guess := self._guess(row.request, num_beside))]
        if not guesses:
            return 0
        guesses.sort(key=lambda pair: len(pair[1]))
        total = 0
        for index, (row, guess) in enumerate(guesses):
            share = (left - total) // (len(guesses) - index)
            total += self._put(row, guess[:share], num_running)
        return total

    def book(self, row: StepRow) -> None:
        """Make the accepted drafts of a computed row known."""
        request = row.request
        request.num_known += row.num_accepted
        self._counters.output_tokens += row.num_accepted
        if row.num_drafts and request.lookup is not None:
            self._counters.draft_tokens += row.num_drafts
            self._counters.accepted_tokens += row.num_accepted
            request.lookup.learn(row.num_drafts, row.num_accepted)

    def _guess(self, request: Request, num_beside: int) -> list[int]:
        num_known = request.num_known
        if num_known == request.prompt_len or request.finish_reason is not None:
            return []
        if request.lookup is None:
            request.lookup = PromptLookup()
        most = min(MAX_DRAFTS, request.max_known - num_known - 1)
        guess = request.lookup.guess(request.token_ids[:num_known], most, num_beside)
        request.look_from = request.lookup.look_from
        for index, token_id in enumerate(guess):
            if token_id in request.stop_ids:
                return guess[:index]
        return guess

    def _put(self, row: StepRow, guess: list[int], num_running: int) -> int:
        request, begin = row.request, row.request.num_known
        end, room = begin + len(guess), request.num_blocks * self._block_size
        if end > room:
            wanted = -(-end // self._block_size) - request.num_blocks
            if self._blocks.num_available >= num_running + wanted:
                self._blocks.extend(request, end)
            else:
                end = room
        row.num_drafts = end - begin
        row.num_tokens += row.num_drafts
        request.token_ids[begin:end] = guess[: row.num_drafts]
        return row.num_drafts
