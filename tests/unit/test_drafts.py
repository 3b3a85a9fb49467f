"""Guesses in a step: what they may take, what becomes of the right and of the wrong ones."""

from __future__ import annotations

import numpy as np
import pytest

from engine.scheduling.step_plan import StepPlan, StepRow
from helpers.guessing import Oracle
from helpers.scheduling import Harness, answer_alone, greedy, prompt

VOCAB_SIZE = 50
STEP_TOKENS = 40


def oracle(patch: pytest.MonkeyPatch, *asks, error_rate: float = 0.0) -> Oracle:
    """Knows the answers of requests (prompt, params)."""
    texts = [tokens + answer_alone(tokens, params).token_ids for tokens, params in asks]
    known = Oracle(texts, error_rate, VOCAB_SIZE, seed=3)
    known.install(patch)
    return known


def plan_of(h: Harness, *drafts: int) -> tuple[StepPlan, StepRow]:
    """A row of one request with these drafts behind its last known token."""
    h.submit("a", prompt(20), greedy(max_tokens=20))
    plan = h.scheduler.schedule()
    row = plan.rows[0]
    row.request.token_ids[20 : 20 + len(drafts)] = drafts
    row.num_drafts, row.num_tokens = len(drafts), row.num_tokens + len(drafts)
    return plan, row


@pytest.mark.parametrize(
    ("drawn", "num_accepted"),
    [([1, 2, 3, 9], 3), ([1, 2, 9, 9], 2), ([9, 2, 3, 9], 0), ([1, 9, 3, 9], 1), ([1, 2, 3, -1], 2)],
)
def test_drafts_are_right_up_to_the_first_wrong_one(drawn, num_accepted):
    plan, row = plan_of(Harness(), 1, 2, 3)
    plan.accept(np.array(drawn, np.int32))
    assert row.num_accepted == num_accepted
    assert [draw.num_known for draw in plan.draws] == [20, 21, 22, 23]


def test_cut_drafts_are_not_computed():
    plan, row = plan_of(Harness(), 1, 2, 3)
    row.cut_drafts(1)
    assert (row.drafts.tolist(), plan.num_tokens, len(plan.draws)) == ([1], 21, 2)


def test_right_guesses_save_steps(monkeypatch):
    tokens, params = prompt(20), greedy(max_tokens=100)
    known = oracle(monkeypatch, (tokens, params))
    h = Harness(max_step_drafts=64)
    h.submit("a", tokens, params)
    h.run()
    counters = h.scheduler.counters
    assert h.tokens("a") == answer_alone(tokens, params).token_ids
    assert counters.num_steps < 40
    assert counters.output_tokens == 100
    assert counters.draft_tokens == counters.accepted_tokens == known.num_right == h.runner.num_drafts
    assert counters.num_steps + counters.accepted_tokens == 100


def test_refused_drafts_leave_nothing_in_the_tree(monkeypatch):
    """A later request that finds the blocks gets the answer that it gets alone."""
    tokens, params = prompt(20), greedy(max_tokens=150)
    known = oracle(monkeypatch, (tokens, params), error_rate=0.5)
    expected = answer_alone(tokens, params).token_ids
    h = Harness(max_step_drafts=64)
    h.submit("a", tokens, params)
    h.run()
    for length in (40, 77, 130):
        h.submit(f"b{length}", tokens + expected[:length], greedy(max_tokens=150 - length))
        h.run()
        assert h.tokens(f"b{length}") == expected[length:]
    assert h.scheduler.counters.prompt_tokens_cached > 200
    assert known.num_cut_short > 5


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 17])
def test_the_limit_within_a_guess(monkeypatch, max_tokens):
    """Blocks, token ids and the answer end at max_tokens; the fake runner checks the first two."""
    tokens = prompt(16)
    oracle(monkeypatch, (tokens, greedy(max_tokens=60)))
    h = Harness(max_step_drafts=64, num_blocks=4)
    h.submit("a", tokens, greedy(max_tokens=max_tokens))
    h.run()
    assert h.answers["a", 0].finish_reason == "length"
    assert h.tokens("a") == answer_alone(tokens, greedy(max_tokens=max_tokens)).token_ids


def test_the_context_ends_within_a_guess(monkeypatch):
    tokens, params = prompt(16), greedy(max_tokens=None)
    oracle(monkeypatch, (tokens, greedy(max_tokens=48)))
    h = Harness(max_step_drafts=64, num_blocks=4)
    h.submit("a", tokens, params)
    h.run()
    assert len(h.tokens("a")) == 48 and h.answers["a", 0].finish_reason == "length"


@pytest.mark.parametrize("place", range(8))
def test_a_stop_token_within_a_guess(monkeypatch, place):
    tokens, params = prompt(20), greedy(max_tokens=60)
    known = oracle(monkeypatch, (tokens, params))
    free = answer_alone(tokens, params).token_ids
    stop = free[place]
    h = Harness(max_step_drafts=64, eos_token_ids=(stop,))
    h.submit("a", tokens, params)
    h.run()
    assert h.tokens("a") == free[: free.index(stop) + 1]
    assert h.answers["a", 0].stop_token_id == stop
    assert place < 3 or known.num_right


def test_drafts_take_only_what_a_step_has_left(monkeypatch):
    asks = [(prompt(30, seed), greedy(max_tokens=60)) for seed in range(6)]
    known = oracle(monkeypatch, *asks, error_rate=0.1)
    h = Harness(max_step_drafts=1000, chunked_prefill_size=STEP_TOKENS)
    for number, (tokens, params) in enumerate(asks):
        h.submit(f"r{number}", tokens, params)
    while h.scheduler.has_work:
        plan = h.step()
        assert plan.num_tokens <= STEP_TOKENS
        has_prefill = any(not row.samples for row in plan.rows)
        assert not has_prefill or not any(row.num_drafts for row in plan.rows)
    assert known.num_right > 100


def test_no_time_no_drafts(monkeypatch):
    """Steps that take longer than --target-itl-ms already get no longer still."""
    tokens, params = prompt(20), greedy(max_tokens=60)
    known = oracle(monkeypatch, (tokens, params))
    h = Harness(max_step_drafts=64, target_itl_s=0.1)
    launch = h.runner.launch

    def slow(plan):
        h.now += 1.0
        return launch(plan)

    monkeypatch.setattr(h.runner, "launch", slow)
    h.submit("a", tokens, params)
    h.run()
    assert h.tokens("a") == answer_alone(tokens, params).token_ids
    assert known.num_guessed <= 15, "but for the first one, before any step was measured"


def test_drafts_are_shared_out(monkeypatch):
    asks = [(prompt(20, seed), greedy(max_tokens=90)) for seed in range(8)]
    oracle(monkeypatch, *asks)
    h = Harness(max_step_drafts=8)
    for number, (tokens, params) in enumerate(asks):
        h.submit(f"r{number}", tokens, params)
    counts: list[int] = []
    while h.scheduler.has_work:
        plan = h.step()
        assert sum(row.num_drafts for row in plan.rows) <= 8
        counts += [row.num_drafts for row in plan.rows if row.samples and len(plan.rows) == 8]
    assert counts.count(1) > len(counts) / 2


def test_guesses_take_no_block_that_known_tokens_need(monkeypatch):
    """Blocks beyond those of known tokens are taken while one is left for each running request."""
    asks = [(prompt(8, seed), greedy(max_tokens=32)) for seed in range(12)]
    oracle(monkeypatch, *asks, error_rate=0.2)
    h = Harness(max_step_drafts=64, num_blocks=30, block_size=4, enabled=False)
    for number, (tokens, params) in enumerate(asks):
        h.submit(f"r{number}", tokens, params)
    room: list[tuple[int, int]] = []
    schedule = h.scheduler.schedule

    def watched() -> StepPlan | None:
        plan = schedule()
        room.append((h.cache.num_free + h.cache.num_cached, h.scheduler.num_running))
        return plan

    monkeypatch.setattr(h.scheduler, "schedule", watched)
    num_taken = num_tight = 0
    while h.scheduler.has_work:
        held = {request: request.num_blocks for request in h.scheduler.running}
        plan = h.step()
        num_left, num_running = room[-1]
        for row in plan.rows:
            known = row.start + row.num_tokens - row.num_drafts
            if row.request.num_blocks > max(held.get(row.request, 0), -(-known // 4)):
                num_taken += 1
                assert num_left >= num_running
        num_tight += num_left < num_running
    assert num_taken > 5 and num_tight > 5
    for number, (tokens, params) in enumerate(asks):
        assert h.tokens(f"r{number}") == answer_alone(tokens, params).token_ids


def test_a_lookup_of_its_own_helps_too(monkeypatch):
    """One token that is likely, so that something always repeats, and one that is not."""
    biased = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    h, alone = Harness(max_step_drafts=64), Harness()
    for each in (h, alone):
        monkeypatch.setattr(each.runner, "_pick", lambda draw, value, mask: biased[value % len(biased)])
        each.submit("a", prompt(40), greedy(max_tokens=300))
        each.run()
    assert h.answers == alone.answers
    counters = h.scheduler.counters
    assert 0 < counters.accepted_tokens < counters.draft_tokens
