import time

import numpy as np
import pytest

from engine.sampling.params import SamplingParams
from engine.scheduling import block_claims
from engine.scheduling.step_plan import StepResult
from engine.scheduling.step_time import StepTimeModel
from helpers.scheduling import Harness, answer_alone, greedy, prompt

# --- one request


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 33, 511, 512, 513, 1300])
@pytest.mark.parametrize("chunk", [1, 16, 100, 512])
def test_answer_does_not_depend_on_chunks(length, chunk):
    if chunk == 1 and length > 100:
        chunk = 7
    h = Harness(chunked_prefill_size=chunk)
    h.submit("a", prompt(length), greedy(max_tokens=20))
    h.run()
    expected = answer_alone(prompt(length), greedy(max_tokens=20), chunked_prefill_size=4096)
    assert h.answers["a", 0] == expected
    assert len(expected.token_ids) == 20
    assert expected.finish_reason == "length"
    assert all(sum(row[3] for row in rows) <= chunk for rows in h.runner.plans)


def test_fake_runner_sees_a_wrong_block_table():
    def run(corrupt):
        h = Harness()
        h.submit("a", prompt(40), greedy(max_tokens=4))
        h.step()
        if corrupt:
            request = next(iter(h.scheduler._running))
            table = request.block_table
            table[0], table[1] = table[1], table[0]
        h.step()
        return h.tokens("a")

    assert run(corrupt=False) != run(corrupt=True)


def test_stops_at_eos_and_at_stop_tokens():
    free = answer_alone(prompt(20), greedy(max_tokens=50)).token_ids
    eos = free[10]
    first = free.index(eos)
    h = Harness(eos_token_ids=(eos,))
    h.submit("eos", prompt(20), greedy(max_tokens=50))
    h.submit("ignored", prompt(20), greedy(max_tokens=50, ignore_eos=True))
    h.submit("stop", prompt(20), greedy(max_tokens=50, ignore_eos=True, stop_token_ids=(free[3], eos)))
    h.run()
    assert h.tokens("eos") == free[: first + 1]
    assert (h.answers["eos", 0].finish_reason, h.answers["eos", 0].stop_token_id) == ("stop", eos)
    assert h.tokens("ignored") == free
    assert h.answers["ignored", 0].finish_reason == "length"
    assert h.answers["stop", 0].stop_token_id in (free[3], eos)
    assert len(h.tokens("stop")) == min(free.index(free[3]), first) + 1


def test_min_tokens_bans_the_stop_tokens_until_it_is_reached():
    free = answer_alone(prompt(20), greedy(max_tokens=50)).token_ids
    eos = free[4]
    params = greedy(max_tokens=50, min_tokens=30)
    h = Harness(eos_token_ids=(eos,))
    h.submit("a", prompt(20), params)
    h.run()
    assert len(h.tokens("a")) > 30 or h.answers["a", 0].finish_reason == "length"
    assert eos not in h.tokens("a")[:30]


def test_a_stop_token_below_min_tokens_ends_nothing():
    """Should the sampler have had no other choice."""
    h = Harness(eos_token_ids=(5,))
    h.submit("a", prompt(20), greedy(max_tokens=10, min_tokens=3))
    reasons = []
    for _ in range(4):
        plan = h.scheduler.schedule()
        assert (plan.rows[0].request.banned_behind(20 + len(reasons)) is None) == (len(reasons) == 3)
        reasons += [new.finish_reason for new in h.scheduler.update(plan, StepResult(np.array([5])))]
    assert reasons == [None, None, None, "stop"]


def test_max_tokens_zero_needs_no_step():
    h = Harness(max_running_requests=1, max_queued_requests=0)
    h.submit("zero", prompt(20), greedy(max_tokens=0), n=1)
    assert not h.scheduler.has_work
    assert h.scheduler.schedule() is None


def test_context_length_ends_an_open_answer():
    h = Harness(context_length=64)
    h.submit("a", prompt(40), greedy(max_tokens=None))
    h.run()
    assert len(h.tokens("a")) == 24
    assert h.answers["a", 0].finish_reason == "length"


# --- sharing


def test_second_identical_request_computes_only_its_tail():
    h = Harness()
    h.submit("a", prompt(500), greedy(max_tokens=4))
    h.run()
    before = h.scheduler.counters.prompt_tokens_computed
    h.submit("b", prompt(500), greedy(max_tokens=4))
    h.run()
    assert h.scheduler.counters.prompt_tokens_computed - before == 4
    assert h.scheduler.counters.prompt_tokens_cached == 496
    assert h.tokens("a") == h.tokens("b") == answer_alone(prompt(500), greedy(max_tokens=4)).token_ids


def test_two_identical_requests_at_once_compute_the_prompt_once():
    h = Harness()
    for name in "ab":
        h.submit(name, prompt(500), greedy(max_tokens=4))
    h.run()
    assert h.scheduler.counters.prompt_tokens_computed <= 520
    assert h.scheduler.counters.prompt_tokens_cached == 496
    assert h.tokens("a") == h.tokens("b")


@pytest.mark.parametrize("chunk", [16, 100, 512, 8192])
def test_common_prefix_of_eight_is_computed_once(chunk):
    h = Harness(chunked_prefill_size=chunk, num_blocks=512)
    for i in range(8):
        h.submit(f"r{i}", prompt(1024) + prompt(32, seed=i + 1), greedy(max_tokens=8))
    h.run()
    assert h.scheduler.counters.prompt_tokens_computed <= 1024 + 8 * (32 + 16)
    for i in range(8):
        alone = answer_alone(prompt(1024) + prompt(32, seed=i + 1), greedy(max_tokens=8))
        assert h.answers[f"r{i}", 0] == alone


def test_choices_share_one_prompt_and_differ():
    h = Harness()
    params = SamplingParams(temperature=1, seed=3, max_tokens=12)
    h.submit("a", prompt(500), params, n=6)
    h.run()
    assert h.scheduler.counters.prompt_tokens_computed <= 500 + 5 * 16
    answers = [h.tokens("a", choice) for choice in range(6)]
    assert len({tuple(tokens) for tokens in answers}) == 6
    assert answers == [answer_alone(prompt(500), params, choice).token_ids for choice in range(6)]


def test_a_prefix_that_starts_later_is_taken_from_the_running_one():
    h = Harness(chunked_prefill_size=64)
    h.submit("a", prompt(640), greedy(max_tokens=4))
    for _ in range(3):
        h.step()
    h.submit("b", prompt(640), greedy(max_tokens=4))
    h.run()
    assert h.scheduler.counters.prompt_tokens_computed <= 640 + 16


def test_output_tokens_are_cached_for_the_next_turn():
    h = Harness()
    h.submit("a", prompt(32), greedy(max_tokens=33))
    h.run()
    turn = prompt(32) + h.tokens("a") + prompt(5, seed=9)
    h.submit("b", turn, greedy(max_tokens=4))
    h.run()
    assert h.scheduler.counters.prompt_tokens_cached == 64
    assert h.answers["b", 0] == answer_alone(turn, greedy(max_tokens=4))


def test_namespaces_never_meet():
    h = Harness()
    h.submit("a", prompt(200), greedy(max_tokens=2), namespace="one")
    h.submit("b", prompt(200), greedy(max_tokens=2), namespace="two")
    h.run()
    h.submit("c", prompt(200), greedy(max_tokens=2))
    h.run()
    assert h.scheduler.counters.prompt_tokens_cached == 0
    assert h.scheduler.counters.prompt_tokens_computed == 600


def test_without_the_cache_nothing_is_shared_or_waited_for():
    h = Harness(enabled=False)
    h.submit("a", prompt(100), greedy(max_tokens=2))
    h.submit("b", prompt(100), greedy(max_tokens=2))
    plan = h.step()
    assert [row.num_tokens for row in plan.rows] == [100, 100]
    h.run()
    assert h.cache.num_cached == 0
    assert h.scheduler.counters.prompt_tokens_cached == 0


@pytest.mark.parametrize("how", ["cancel", "fail"])
def test_waiting_for_a_block_ends_with_its_owner(how):
    h = Harness(chunked_prefill_size=64)
    h.submit("owner", prompt(320), greedy(max_tokens=2))
    h.submit("waits", prompt(320), greedy(max_tokens=2))
    plan = h.step()
    assert [row.request.request_id for row in plan.rows] == ["owner"]
    if how == "cancel":
        h.scheduler.cancel("owner")
    else:
        plan = h.scheduler.schedule()
        assert h.scheduler.abandon(plan) == ["owner"]
    h.run()
    assert h.answers["waits", 0] == answer_alone(prompt(320), greedy(max_tokens=2))
    assert h.runner.tokens_computed["waits"] == 320 - 64 + 1


def test_colliding_hashes_are_no_common_prefix(monkeypatch):
    monkeypatch.setattr(block_claims, "hash", lambda value: 7, raising=False)
    h = Harness()
    seeds = {"first": 0, "same": 0, "other": 1, "elsewhere": 0}
    for name, seed in seeds.items():
        namespace = "two" if name == "elsewhere" else "one"
        h.submit(name, prompt(100, seed), greedy(max_tokens=4), namespace=namespace)
    plan = h.step()
    assert [row.request.request_id for row in plan.rows] == ["first", "other", "elsewhere"]
    h.run()
    for name, seed in seeds.items():
        assert h.answers[name, 0] == answer_alone(prompt(100, seed), greedy(max_tokens=4))


# --- the budget


@pytest.mark.parametrize("chunk", [1, 5, 32])
def test_decodes_are_in_every_step(chunk):
    """Also where they are more than the chunk; prompts get on beside them."""
    h = Harness(chunked_prefill_size=chunk)
    names = [f"d{i}" for i in range(12)]
    for i, name in enumerate(names):
        h.submit(name, prompt(4, seed=i), greedy(max_tokens=200))
    while not all(map(h.tokens, names)):
        h.step()
    h.submit("long", prompt(600, seed=9), greedy(max_tokens=2))
    for _ in range(10):
        by_id = {row.request.request_id: row.num_tokens for row in h.step().rows}
        assert 1 <= by_id.pop("long") <= chunk
        assert by_id == dict.fromkeys(names, 1)


def take_time(h, seconds):
    """Have steps last as long as `seconds` says of their plan."""
    execute = h.runner.execute

    def timed(plan):
        h.now += seconds(plan)
        return execute(plan)

    h.runner.execute = timed


def test_prefill_beside_decodes_keeps_to_the_time_target():
    h = Harness(chunked_prefill_size=512, target_itl_s=0.5, num_blocks=1024)
    seconds = lambda plan: 0.02 + 0.004 * sum(r.num_tokens for r in plan.rows if r.num_tokens > 1)  # noqa: E731
    take_time(h, seconds)
    h.submit("decodes", prompt(100), greedy(max_tokens=300))
    for _ in range(20):
        h.step()
    h.submit("long", prompt(8000, seed=1), greedy(max_tokens=2))
    sizes = []
    while not h.tokens("long"):
        plan = h.step()
        assert any(row.request.request_id == "decodes" for row in plan.rows)
        assert seconds(plan) <= 0.5
        sizes.append(plan.num_tokens - 1)
    assert max(sizes) >= 96  # (0.5 - 0.02) / 0.004 = 120, in whole blocks


def test_an_impossible_target_still_makes_progress():
    h = Harness(target_itl_s=1e-9)
    take_time(h, lambda plan: 1.0)
    h.submit("decodes", prompt(10), greedy(max_tokens=200))
    h.step()
    h.submit("long", prompt(300, seed=1), greedy(max_tokens=2))
    while not h.answers["long", 0].finish_reason:
        h.step()
    assert not h.answers["decodes", 0].finish_reason, "it had to wait for the other one's end"
    h.run()


def test_prefill_alone_is_not_held_back_by_the_time_target():
    h = Harness(target_itl_s=1e-9, chunked_prefill_size=64)
    take_time(h, lambda plan: 1.0)
    for i in range(3):
        h.submit(f"r{i}", prompt(100, seed=i), greedy(max_tokens=1))
        assert h.step().num_tokens == 64
        h.run()


def test_step_time_model_learns_a_line_and_forgets_a_stall():
    model = StepTimeModel()
    assert model.prefill_tokens_within(0.1, most=512) == 512
    for _ in range(50):
        model.observe(0, 0.010)
        model.observe(100, 0.010 + 0.1)
    assert model.prefill_tokens_within(0.110, most=512) == pytest.approx(100, abs=1)
    assert model.prefill_tokens_within(0.010, most=512) == 0
    model.observe(0, 5.0)
    model.observe(100, 60.0)
    for _ in range(120):
        model.observe(0, 0.010)
        model.observe(100, 0.110)
    assert model.prefill_tokens_within(0.110, most=512) == pytest.approx(100, abs=5)


# --- cost


def test_a_decode_step_of_sixteen_is_cheap():
    """Guards against accidental quadratic work; the figure itself belongs to the bench."""

    h = Harness(num_blocks=200, debug_checks=False)
    for i in range(16):
        h.submit(f"r{i}", prompt(10, seed=i), greedy(max_tokens=120))
    while any(not h.tokens(f"r{i}") for i in range(16)):
        h.step()
    result = StepResult(np.zeros(16, np.int32))
    times = []
    for _ in range(60):
        begin = time.thread_time()
        plan = h.scheduler.schedule()
        h.scheduler.update(plan, result)
        times.append(time.thread_time() - begin)
    assert sorted(times)[len(times) // 2] < 1e-3


def test_one_that_runs_alone_shares_no_step_and_holds_nobody_up():
    h = Harness()
    h.submit("alone", prompt(40), greedy(max_tokens=20), n=2, runs_alone=True)
    h.submit("also", prompt(40), greedy(max_tokens=20), runs_alone=True)  # of the same blocks
    h.submit("a", prompt(40, seed=1), greedy(max_tokens=10))
    h.submit("b", prompt(40, seed=2), greedy(max_tokens=10))
    h.run()
    steps = [{row[0] for row in rows} for rows in h.runner.plans]
    assert all(names in ({"alone"}, {"also"}) or names <= {"a", "b"} for names in steps)
    last = max(i for i, names in enumerate(steps) if names <= {"a", "b"})
    assert last < 3 * 12, "the others have every third step"
    assert h.tokens("alone") == h.tokens("also") == answer_alone(prompt(40), greedy(max_tokens=20)).token_ids
