import asyncio
import dataclasses
import logging

import msgspec
import numpy as np
import pytest

from engine.core.client import EngineState
from engine.core.engine_core import EngineCore
from engine.core.local_client import LocalClient
from engine.core.messages import (
    Admitted,
    CacheFlushed,
    CancelChoice,
    CancelRequest,
    EngineReady,
    EngineStats,
    Failed,
    FlushCache,
    GenerateRequest,
    StatsRequest,
    TokenChunk,
)
from engine.core.streams import StreamTable
from engine.errors import InternalError, InvalidRequest, Overloaded
from engine.sampling.params import SamplingParams
from engine.scheduling.settings import SchedulerSettings
from helpers.engines import FakeRunner
from helpers.prefix_cache import PlainPrefixCache
from helpers.scheduling import answer_alone

SETTINGS = SchedulerSettings(
    context_length=1024,
    vocab_size=50,
    max_running_requests=4,
    max_queued_requests=2,
    chunked_prefill_size=64,
    debug_checks=True,
)
INFO = EngineReady(1024, 4, 16, 1024, "none", "cpu", "none", 1, 2)


def make_core():
    runner, cache = FakeRunner(64, 16), PlainPrefixCache(64, 16)
    return EngineCore(SETTINGS, runner, cache, draw_seed=lambda: 1234), runner


def generate(request_id, ids, n=1, **params):
    params = SamplingParams(**({"temperature": 0, "max_tokens": 8} | params))
    return GenerateRequest(request_id, np.array(ids, "<i4").tobytes(), params, n)


def run(core, max_steps=500):
    messages = []
    for _ in range(max_steps):
        if not core.has_work:
            return messages
        messages += core.step()
    raise AssertionError("not finished")


def tokens_of(messages, request_id, choice=0):
    chunks = [m for m in messages if isinstance(m, TokenChunk)]
    return [t for m in chunks if (m.request_id, m.choice) == (request_id, choice) for t in m.token_ids]


def test_messages_of_a_request_in_order():
    core, _ = make_core()
    core.handle(generate("a", range(20), n=2, temperature=1))
    messages = run(core)
    assert messages[:2] == [Admitted("a", 0, 1234), Admitted("a", 1, 1234)]
    last = [m for m in messages[2:] if m.finish_reason]
    assert [(m.choice, m.finish_reason) for m in last] == [(0, "length"), (1, "length")]
    params = SamplingParams(seed=1234, max_tokens=8)
    for choice in (0, 1):
        expected = answer_alone(range(20), params, choice).token_ids
        assert tokens_of(messages, "a", choice) == expected


def test_admission_and_refusal_are_announced_before_the_step_computes():
    core, runner = make_core()
    execute, order = runner.execute, []

    def watched(plan):
        order.append("computed")
        return execute(plan)

    runner.execute = watched
    core.handle(generate("a", range(20)))
    core.handle(generate("too long", range(2000)))
    order_of = {Admitted: "admitted", Failed: "refused"}
    messages = core.step(announce=lambda early: order.extend(order_of[type(m)] for m in early))
    assert order == ["refused", "admitted", "computed"]
    assert [type(m) for m in messages] == [TokenChunk], "nothing is said twice"


def test_a_given_seed_is_used_and_reported():
    core, _ = make_core()
    core.handle(generate("a", range(20), temperature=1, seed=-5))
    messages = run(core)
    assert messages[0] == Admitted("a", 0, -5)
    assert (
        tokens_of(messages, "a") == answer_alone(range(20), SamplingParams(seed=-5, max_tokens=8)).token_ids
    )


def test_logprobs_belong_to_their_tokens():
    core, _ = make_core()
    core.handle(generate("none", range(10)))
    core.handle(generate("own", range(11), logprobs=0))
    core.handle(generate("two", range(12), logprobs=2))
    core.handle(generate("five", range(13), logprobs=5))
    messages = [m for m in run(core) if isinstance(m, TokenChunk)]
    for m in messages:
        if m.request_id == "none":
            assert m.logprobs is None
            continue
        (scores,) = m.logprobs
        count = {"own": 0, "two": 2, "five": 5}[m.request_id]
        assert len(scores.top_ids) == len(scores.top_logprobs) == count
        if count:
            assert (scores.top_ids[0], scores.top_logprobs[0]) == (m.token_ids[0], scores.token_logprob)


def test_max_tokens_zero_is_answered_at_once():
    core, runner = make_core()
    core.handle(generate("a", range(10), n=2, max_tokens=0))
    assert core.has_work
    messages = core.step()
    assert messages == [
        Admitted("a", 0, 1234),
        TokenChunk("a", 0, [], finish_reason="length"),
        Admitted("a", 1, 1234),
        TokenChunk("a", 1, [], finish_reason="length"),
    ]
    assert runner.num_steps == 0
    assert not core.has_work


def scores_of(messages, request_id, choice=0):
    chunks = [m for m in messages if isinstance(m, TokenChunk) and m.prompt_logprobs is not None]
    return [
        scores
        for m in chunks
        if (m.request_id, m.choice) == (request_id, choice)
        for scores in m.prompt_logprobs
    ]


@pytest.mark.parametrize("max_tokens", [0, 3])
@pytest.mark.parametrize("wanted", [0, 2])
def test_the_prompt_is_scored_once_for_all_choices(max_tokens, wanted):
    core, runner = make_core()
    core.handle(generate("a", range(5, 45), n=3, max_tokens=max_tokens, prompt_logprobs=wanted))
    messages = run(core)
    scores = scores_of(messages, "a")
    assert len(scores) == 39
    assert all(len(s.top_ids) == len(s.top_logprobs) == wanted for s in scores)
    assert not wanted or [s.top_ids[0] for s in scores] == list(range(6, 45))
    assert not scores_of(messages, "a", 1)
    chunks = [m for m in messages if isinstance(m, TokenChunk)]
    for choice in range(3):
        own = [m for m in chunks if m.choice == choice]
        assert [m.finish_reason for m in own][-1] == "length"
        assert sum(m.finish_reason is not None for m in own) == 1
        assert len(tokens_of(messages, "a", choice)) == max_tokens
    first = [m for m in chunks if m.choice == 0]
    assert [bool(m.prompt_logprobs) for m in first] == [True] + [False] * max(max_tokens, 1)
    assert core.stats().output_tokens == 3 * max_tokens
    assert core.stats().num_blocks_in_use == 0
    assert runner.tokens_computed["a"] >= 40


def test_a_cancel_in_the_middle_of_scoring_frees_everything():
    core, _ = make_core()
    core.handle(generate("a", range(50), max_tokens=0, prompt_logprobs=0))
    core.handle(generate("b", [*range(50), *range(50)], n=2, prompt_logprobs=0))
    messages = core.step()
    assert 0 < len(scores_of(messages, "b")) < 99
    core.handle(CancelRequest("b"))
    assert not any(m.request_id == "b" for m in run(core))
    assert core.stats().num_blocks_in_use == 0


def test_a_prompt_of_one_token_has_no_scores():
    core, runner = make_core()
    core.handle(generate("a", [7], max_tokens=0, prompt_logprobs=1))
    assert [type(m) for m in core.step()] == [Admitted, TokenChunk]
    assert runner.num_steps == 0
    core.handle(generate("b", [7], max_tokens=2, prompt_logprobs=1))
    messages = run(core)
    assert len(tokens_of(messages, "b")) == 2
    assert scores_of(messages, "b") == []


def test_cached_positions_are_computed_again_for_scores_and_found_by_others():
    core, runner = make_core()
    core.handle(generate("plain", range(40)))
    run(core)
    core.handle(generate("scored", range(40), prompt_logprobs=0))
    messages = run(core)
    assert runner.tokens_computed["scored"] >= 40
    assert len(scores_of(messages, "scored")) == 39
    assert {m.cached_tokens for m in messages if isinstance(m, TokenChunk)} == {0}
    core.handle(FlushCache())
    core.handle(generate("other", range(3, 43), prompt_logprobs=0, max_tokens=0))
    run(core)
    core.handle(generate("later", range(3, 43)))
    assert {m.cached_tokens for m in run(core) if isinstance(m, TokenChunk)} == {32}


@pytest.mark.parametrize("start", [0, 1, 2, 16, 17, 33, 36, 39, 40])
@pytest.mark.parametrize("max_tokens", [0, 2])
def test_what_needs_no_scores_comes_from_the_cache(start, max_tokens):
    core, _ = make_core()
    core.handle(generate("plain", range(40)))
    run(core)
    asked = {"prompt_logprobs": 1, "prompt_logprobs_start": start, "max_tokens": max_tokens}
    core.handle(generate("scored", range(40), n=2, **asked))
    messages = run(core)
    assert [s.top_ids[0] for s in scores_of(messages, "scored")] == list(range(max(1, start), 40))
    assert len(tokens_of(messages, "scored")) == max_tokens
    if start < 40:  # else there is nothing left to do, or what any other request does
        cached = max(0, start - 1) // 16 * 16
        own = [m for m in messages if isinstance(m, TokenChunk) and m.choice == 0]
        assert {m.cached_tokens for m in own} == {cached}


@pytest.mark.parametrize(
    ("request_", "kind", "slug"),
    [
        (generate("x", []), InvalidRequest, "invalid_value"),
        (generate("x", [1] * 1025), InvalidRequest, "context_length_exceeded"),
        (generate("x", [50]), InvalidRequest, "invalid_value"),
        (generate("x", [1], n=7), InvalidRequest, "invalid_value"),
        (generate("x", [1], n=0), InvalidRequest, "invalid_value"),
        (GenerateRequest("x", b"123", SamplingParams()), InvalidRequest, "invalid_value"),
        (generate("x", [1], n=4), Overloaded, "queue_full"),
        (generate("busy", [1]), InvalidRequest, "invalid_value"),
    ],
)
def test_refusals_are_one_message_and_harm_nobody(request_, kind, slug):
    core, _ = make_core()
    core.handle(generate("busy", range(30), n=3))
    core.handle(request_)
    messages = run(core)
    (failed,) = [m for m in messages if isinstance(m, Failed)]
    assert failed.request_id == request_.request_id
    error = failed.to_error()
    assert (type(error), error.slug) == (kind, slug)
    assert all(len(tokens_of(messages, "busy", choice)) == 8 for choice in range(3))
    assert core.stats().num_blocks_in_use == 0


def test_a_failing_step_fails_its_requests_only(caplog):
    core, runner = make_core()
    core.handle(msgspec.structs.replace(generate("a", range(20)), trace_id="trace of a"))
    core.step()
    core.handle(generate("b", range(5, 30), n=2))
    runner.fail_next = RuntimeError("secret path /root")
    with caplog.at_level(logging.ERROR):
        messages = core.step()
    failed = [m for m in messages if isinstance(m, Failed)]
    assert sorted(m.request_id for m in failed) == ["a", "b"]
    assert all(isinstance(m.to_error(), InternalError) and "secret" not in m.message for m in failed)
    assert "RuntimeError: secret path" in caplog.text
    assert "failed, and with it a (x-request-id trace of a), b\n" in caplog.text
    assert not core.has_work
    assert core.stats().num_blocks_in_use == 0
    core.handle(generate("c", range(20)))
    assert len(tokens_of(run(core), "c")) == 8


def test_a_request_without_a_possible_token_fails_alone():
    core, runner = make_core()
    execute = runner.execute

    def broken_for_a(plan):
        result = execute(plan)
        is_broken = [row.request.request_id == "a" and row.request.choice == 0 for row in plan.sampled_rows]
        return dataclasses.replace(result, token_ids=np.where(is_broken, -1, result.token_ids))

    runner.execute = broken_for_a
    core.handle(generate("a", range(20), n=2))
    core.handle(generate("b", range(5, 30)))
    messages = run(core)
    (failed,) = [m for m in messages if isinstance(m, Failed)]
    assert failed.request_id == "a"
    assert isinstance(failed.to_error(), InternalError)
    assert (
        tokens_of(messages, "b")
        == answer_alone(range(5, 30), SamplingParams(temperature=0, max_tokens=8)).token_ids
    )
    assert core.stats().num_blocks_in_use == 0


def test_cancels_are_silent_and_free_everything():
    core, _ = make_core()
    core.handle(generate("a", range(20), n=2, max_tokens=100))
    core.handle(generate("b", range(20), max_tokens=100))
    core.step()
    core.handle(CancelChoice("a", 0))
    core.handle(CancelRequest("b"))
    core.handle(CancelRequest("nobody"))
    messages = core.step() + core.step()
    assert {(m.request_id, m.choice) for m in messages if isinstance(m, TokenChunk)} == {("a", 1)}
    core.handle(CancelRequest("a"))
    assert core.step() == []
    assert core.stats().num_blocks_in_use == 0


def test_stats_and_flush():
    core, _ = make_core()
    core.handle(generate("a", range(40)))
    run(core)
    core.handle(generate("b", range(40)))
    messages = run(core)
    assert [m.cached_tokens for m in messages if isinstance(m, TokenChunk)] == [32] * 8
    core.handle(StatsRequest())
    (stats,) = core.step()
    assert isinstance(stats, EngineStats)
    assert (stats.prompt_tokens_computed, stats.prompt_tokens_cached, stats.output_tokens) == (48, 32, 16)
    assert stats.num_blocks_free + stats.num_blocks_cached == stats.num_blocks_total == 64
    assert stats.num_blocks_cached == 2
    core.handle(FlushCache())
    assert core.step() == [CacheFlushed(True)]
    stats = core.stats()
    assert (stats.num_blocks_cached, stats.tokens_evicted) == (0, 32)


def test_a_busy_engine_keeps_its_cache():
    core, _ = make_core()
    core.handle(generate("a", range(40)))
    run(core)
    cached = core.stats().num_blocks_cached
    assert cached > 0
    core.handle(generate("b", range(20, 40)))
    core.handle(FlushCache())  # b waits
    assert CacheFlushed(False) in core.step()
    core.handle(FlushCache())  # b runs
    assert CacheFlushed(False) in core.step()
    assert core.stats().num_blocks_cached >= cached
    run(core)
    core.handle(FlushCache())
    assert core.step() == [CacheFlushed(True)]
    assert core.stats().num_blocks_cached == 0


# --- the same behind the client protocol


async def collect(stream):
    return [chunk async for chunk in stream]


def test_local_client_serves_many_at_once():
    async def main():
        core, _ = make_core()
        client = LocalClient(core, INFO)
        requests = [generate(f"r{i}", range(i + 1, i + 20)) for i in range(6)]

        async def one(request):
            return await collect(await client.submit(request))

        answers = await asyncio.gather(*map(one, requests))
        for i, chunks in enumerate(answers):
            expected = answer_alone(range(i + 1, i + 20), requests[i].params).token_ids
            assert [t for c in chunks for t in c.token_ids] == expected
        assert (await client.stats()).num_blocks_in_use == 0
        assert await client.flush()
        assert (await client.stats()).num_blocks_cached == 0
        await client.close()

    asyncio.run(main())


def test_local_client_refusal_cancel_and_close():
    async def main():
        core, _ = make_core()
        client = LocalClient(core, INFO)
        with pytest.raises(InvalidRequest):
            await client.submit(generate("bad", []))
        stream = await client.submit(generate("a", range(20), n=2, max_tokens=500))
        assert stream.admitted == Admitted("a", 0, 1234)
        client.cancel_choice("a", 0)
        seen = []
        async for chunk in stream:
            seen.append(chunk.choice)
            if len(seen) == 5:
                client.cancel("a")
        assert seen == [1] * 5
        assert core.stats().num_running == 0
        for i in range(4):
            await client.submit(generate(f"b{i}", range(20), max_tokens=500))
        waiting = asyncio.create_task(client.submit(generate("late", range(20))))
        while core.stats().num_waiting == 0:
            await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert core.stats().num_waiting == 0
        await client.close()
        with pytest.raises(Overloaded):
            await client.submit(generate("c", range(20)))

    asyncio.run(main())


def test_local_client_does_not_hang_when_the_engine_breaks():
    async def main():
        core, _ = make_core()
        client = LocalClient(core, INFO)
        stream = await client.submit(generate("a", range(20), max_tokens=500))
        core._scheduler.schedule = lambda: 1 / 0
        with pytest.raises(InternalError):
            await collect(stream)
        assert client.state is EngineState.FAILED

    asyncio.run(main())


def test_a_choice_that_was_ended_says_nothing_more():
    """Chunks that were on their way when a stop string was seen."""

    async def main():
        table = StreamTable()
        stream = table.open(generate("a", [1], n=2))
        table.cancel_choice("a", 0)
        last = {"finish_reason": "length"}
        table.dispatch(
            [TokenChunk("a", 0, [5]), TokenChunk("a", 1, [6], **last), TokenChunk("a", 0, [7], **last)]
        )
        assert [chunk.token_ids async for chunk in stream] == [[6]]
        assert len(table) == 0

    asyncio.run(main())
