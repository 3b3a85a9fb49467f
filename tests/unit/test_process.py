"""The supervisor against real processes; what they run is a fake engine."""

import asyncio
import contextlib
import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest

from engine.config.engine_config import EngineConfig
from engine.core import frames
from engine.core.client import EngineState
from engine.core.drain_rate import DrainRate
from engine.core.messages import CancelRequest, GenerateRequest, Shutdown, ToEngine
from engine.core.process import Patience, ProcessClient
from engine.errors import ConfigError, InternalError, InvalidRequest, Overloaded
from engine.sampling.params import SamplingParams
from helpers import fake_engine_process as fake
from helpers.http_server import wait_until
from helpers.scheduling import answer_alone

SCRIPT = Path(fake.__file__)
COMMAND = (sys.executable, str(SCRIPT))
IMPATIENT = Patience(
    first_delay_s=0.01,
    longest_delay_s=0.02,
    stable_s=60,
    max_failures=2,
    shutdown_s=0.5,
    terminate_s=0.2,
    pulse_s=0.02,
)
DEADLINE_S = 60


def generate(request_id, ids, n=1, **params):
    params = SamplingParams(**({"temperature": 0, "max_tokens": 8} | params))
    return GenerateRequest(request_id, np.array(ids, "<i4").tobytes(), params, n)


@contextlib.asynccontextmanager
async def running(model_path="fine", patience=IMPATIENT, command=COMMAND, **config):
    """A client that is closed at the end, after which no process may be left."""
    client = ProcessClient(EngineConfig(model_path=model_path, **config), command=command, patience=patience)
    client.start()
    try:
        yield client
    finally:
        await asyncio.wait_for(client.close(), DEADLINE_S)
        assert_gone(client.pid)


def assert_gone(pid):
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def until(condition):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.005)


async def tokens_of(stream):
    return [token async for chunk in stream for token in chunk.token_ids]


def run(test):
    asyncio.run(asyncio.wait_for(test(), 2 * DEADLINE_S))


def test_requests_are_answered_across_the_socket():
    async def main():
        async with running() as client:
            assert client.state is EngineState.LOADING
            assert client.info is None
            with pytest.raises(Overloaded) as caught:
                await client.submit(generate("early", [1]))
            assert caught.value.slug == "model_loading"
            await client.wait_ready()
            assert (client.state, client.state_reason) == (EngineState.READY, "")
            assert client.info.max_running_requests == 4

            async def one(i):
                prompt = range(i, i + 10 + i)
                answer = await tokens_of(await client.submit(generate(f"r{i}", prompt)))
                assert answer == answer_alone(prompt, SamplingParams(temperature=0, max_tokens=8)).token_ids

            await asyncio.gather(*map(one, range(6)))
            with pytest.raises(InvalidRequest, match="vocabulary"):
                await client.submit(generate("bad", [99]))
            with pytest.raises(InvalidRequest, match="has 5000 tokens, but the context length is 1024"):
                await client.submit(generate("long", [1] * 5000))
            with pytest.raises(InternalError):
                await tokens_of(await client.submit(generate("raises", [fake.RAISES, 1])))
            stats = await client.stats()
            assert (stats.num_running, stats.num_waiting, stats.num_blocks_in_use) == (0, 0, 0)
            assert len(client._streams) == 0

    run(main)


def test_cancel_reaches_the_engine():
    async def main():
        async with running() as client:
            await client.wait_ready()
            streams = [
                await client.submit(generate(f"r{i}", [fake.SLOW, i], max_tokens=900)) for i in range(4)
            ]
            waiting = asyncio.create_task(client.submit(generate("waits", [fake.SLOW], max_tokens=900)))
            while (await client.stats()).num_waiting == 0:
                pass
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            for i in range(3):
                client.cancel(f"r{i}")
            client.cancel("nobody")
            stats = await client.stats()
            assert (stats.num_running, stats.num_waiting) == (1, 0)
            assert await tokens_of(streams[0]) == []
            assert not await client.flush()
            client.cancel_choice("r3", 0)
            await tokens_of(streams[3])
            assert (await client.stats()).num_blocks_in_use == 0
            flushed, stats = await asyncio.gather(client.flush(), client.stats())
            assert (flushed, stats.num_blocks_cached) == (True, 0)

    run(main)


def test_refusals_do_not_shorten_the_advised_wait():
    """Places become free as fast as requests end, however many come in vain meanwhile."""
    now = 0.0

    async def main():
        nonlocal now
        async with running() as client:
            await client.wait_ready()
            client._drain_rate = rate = DrainRate(lambda: now)
            rate.note_begin()
            for _ in range(3):
                now += 2
                rate.note_end()
            await client.submit(generate("takes all places", [fake.SLOW], n=104, max_tokens=900))
            for i in range(10):
                with pytest.raises(Overloaded) as caught:
                    await client.submit(generate(f"late{i}", [1]))
                assert (caught.value.slug, caught.value.retry_after_s) == ("queue_full", 2)
            client.cancel("takes all places")
            assert client.retry_after_s < 2, "an end counts"

    run(main)


def test_a_crowd_that_comes_and_goes():
    """Clients that leave at any moment; everybody else gets the right answer and nothing is left."""
    outcomes = []

    async def main():
        async with running() as client:
            await client.wait_ready()

            async def one(i):
                rng = random.Random(i)
                prompt = [1] * rng.randrange(40) + [i % 40, 2, 3]
                params = SamplingParams(seed=i, max_tokens=rng.randrange(1, 60))
                request = generate(f"r{i}", prompt, temperature=1, seed=i, max_tokens=params.max_tokens)
                stream = await client.submit(request)
                leaves_after = rng.choice([None, 1, 5])
                tokens = []
                try:
                    async for chunk in stream:
                        tokens += chunk.token_ids
                        if len(tokens) == leaves_after:
                            break
                finally:
                    client.cancel(request.request_id)
                expected = answer_alone(prompt, params).token_ids
                assert tokens == expected[: len(tokens)]
                assert len(tokens) in (leaves_after, len(expected))
                return len(tokens)

            tasks, rng = [], random.Random(5)
            for i in range(60):
                tasks.append(asyncio.create_task(one(i)))
                if rng.random() < 0.2:
                    rng.choice([task for task in tasks if not task.done()]).cancel()
                for _ in range(rng.randrange(5)):
                    await asyncio.sleep(0)
            outcomes.extend(await asyncio.gather(*tasks, return_exceptions=True))
            stats = await client.stats()
            assert (stats.num_running, stats.num_waiting, stats.num_blocks_in_use) == (0, 0, 0)
            assert len(client._streams) == 0

    run(main)
    errors = [o for o in outcomes if isinstance(o, BaseException)]
    assert all(isinstance(error, asyncio.CancelledError) for error in errors), errors
    assert 3 <= len(errors) <= 30


@pytest.mark.parametrize("how", ["killed from outside", "crash in a step", "lost GPU"])
def test_death_fails_what_is_in_flight_and_service_resumes(how):
    async def main():
        async with running() as client:
            await client.wait_ready()
            pid = client.pid
            streams = [await client.submit(generate(f"r{i}", [fake.SLOW], max_tokens=900)) for i in range(4)]
            waiting = asyncio.create_task(client.submit(generate("waits", [1])))
            await asyncio.sleep(0)
            if how == "killed from outside":
                os.kill(pid, signal.SIGKILL)
            else:
                client.cancel("r3")
                streams.pop()
                with contextlib.suppress(Overloaded):
                    token = fake.CRASHES if how == "crash in a step" else fake.LOSES_GPU
                    await client.submit(generate("crash", [token]))
            for stream in streams:
                with pytest.raises(Overloaded) as caught:
                    await tokens_of(stream)
                assert caught.value.slug == "engine_restarted"
            with contextlib.suppress(Overloaded):
                await waiting
            assert client.state is not EngineState.READY
            ends = {"killed from outside": "SIGKILL", "crash in a step": "SIGSEGV", "lost GPU": "SIGABRT"}
            assert ends[how] in client.state_reason
            with pytest.raises(Overloaded) as caught:
                await client.submit(generate("meanwhile", [1]))
            assert caught.value.slug == "engine_restarted"
            assert_gone(pid)
            await client.wait_ready()
            assert client.pid != pid
            answer = await tokens_of(await client.submit(generate("again", [1, 2, 3])))
            assert len(answer) == 8

    run(main)


@pytest.mark.parametrize("how", ["hangs in a step", "stopped from outside"])
def test_an_engine_that_is_stuck_is_killed(how):
    """What it is asked meanwhile is bounded, and answered with an error in the end."""

    async def main():
        async with running(watchdog_timeout=2) as client:
            await client.wait_ready()
            if how == "stopped from outside":
                os.kill(client.pid, signal.SIGSTOP)
            requests = [generate("hangs", [fake.HANGS]), *(generate(f"r{i}", [1, 2]) for i in range(150))]
            answers = [asyncio.create_task(client.submit(request)) for request in requests]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert len(client._streams) == client.info.num_places == 104
            outcomes = await asyncio.gather(*answers, return_exceptions=True)
            assert [o.slug for o in outcomes[-47:]] == ["queue_full"] * 47
            for outcome in outcomes[:104]:
                if not isinstance(outcome, Overloaded):  # admitted before it hung
                    with pytest.raises(Overloaded) as caught:
                        await tokens_of(outcome)
                    outcome = caught.value
                assert outcome.slug == "engine_restarted"
            await client.wait_ready()
            assert len(await tokens_of(await client.submit(generate("again", [1, 2, 3])))) == 8

    run(main)


def test_repeated_death_is_given_up_with_the_reason():
    async def main():
        async with running("crash") as client:
            with pytest.raises(ConfigError, match="killed by SIGSEGV 3 times in a row"):
                await client.wait_ready()
            assert client.state is EngineState.FAILED
            with pytest.raises(Overloaded):
                await client.submit(generate("a", [1]))

    run(main)


def test_deaths_far_apart_are_no_repeated_failure():
    async def main():
        patience = dataclasses.replace(IMPATIENT, stable_s=0, max_failures=1)
        async with running(patience=patience) as client:
            for _ in range(3):
                await client.wait_ready()
                pid = client.pid
                os.kill(pid, signal.SIGKILL)
                await until(lambda pid=pid: client.pid != pid)
            await client.wait_ready()

    run(main)


@pytest.mark.parametrize(
    ("model_path", "message"),
    [
        ("broken", "^model.safetensors lacks the tensor lm_head.weight$"),
        ("bug", "^the engine could not start: TypeError: two lines$"),
    ],
)
def test_an_engine_that_cannot_start_says_why_once(model_path, message, caplog):
    async def main():
        async with running(model_path) as client:
            pid = client.pid
            with pytest.raises(ConfigError, match=message):
                await client.wait_ready()
            assert client.state is EngineState.FAILED
            assert client.pid == pid, "it was started again"
            assert_gone(pid)

    run(main)
    assert not caplog.records, "the caller says it; twice is once too often"


@pytest.mark.parametrize("when", ["not attached", "loading", "idle", "running", "hanging", "twice"])
def test_close_leaves_nothing(when):
    async def main():
        async with running("slow" if when in ("not attached", "loading") else "fine") as client:
            if when == "not attached":
                return
            client.attach()
            if when == "loading":
                await until(lambda: "loading weights" in client.state_reason)
                return
            await client.wait_ready()
            if when == "running":
                await client.submit(generate("a", [fake.SLOW], max_tokens=900))
            if when == "hanging":
                stream = await client.submit(generate("hang", [fake.HANGS]))  # admitted before it hangs
                await until(lambda: client._child.board.step_request_ids == ["hang"])
                await client.close()
                with pytest.raises(Overloaded):
                    await anext(aiter(stream))
            if when == "twice":
                await client.close()
            if when != "idle":
                await client.close()
                assert client.state is EngineState.DRAINING

    run(main)


@pytest.mark.parametrize(("model_path", "state"), [("fine", "ready"), ("slow", "loading")])
def test_the_engine_dies_with_its_parent(model_path, state):
    """Also while it loads, when it does not look at the connection."""
    program = f"""
import asyncio, sys
sys.path.insert(0, {str(SCRIPT.parents[1])!r})
from engine.config.engine_config import EngineConfig
from engine.core.process import ProcessClient
async def main():
    client = ProcessClient(EngineConfig(model_path={model_path!r}), command={COMMAND!r})
    client.attach()
    while client.state.value != {state!r} or "starting" in client.state_reason:
        await asyncio.sleep(0.01)
    print(client.pid, flush=True)
    await asyncio.sleep(3600)
asyncio.run(main())
"""
    import engine

    environment = os.environ | {"PYTHONPATH": str(Path(engine.__file__).parents[1])}
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment)
    try:
        pid = int(parent.stdout.readline())
        os.kill(pid, 0)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    with contextlib.suppress(psutil.NoSuchProcess):  # gone for good, or nobody's to be asked for
        engine = psutil.Process(pid)
        wait_until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)


def test_an_engine_whose_parent_is_gone_already_does_not_start():
    command = [*COMMAND, "0", "0", "1", "error"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=DEADLINE_S)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_message_that_cannot_be_sent_harms_nobody_else():
    async def main():
        async with running() as client:
            await client.wait_ready()
            bystander = asyncio.create_task(client.submit(generate("bystander", [1, 2, 3])))
            with pytest.raises(InvalidRequest):
                await client.submit(generate("\ud800", [1]))  # no text encoding has a half character
            with pytest.raises(InvalidRequest):
                await client.submit(generate("huge", [1], top_k=2**70))
            assert len(await tokens_of(await bystander)) == 8
            assert len(client._streams) == 0

    run(main)


def test_a_restart_that_fails_is_a_failure(tmp_path):
    """The program is away for a moment, as it is when memory for a process is lacking."""
    program = tmp_path / "engine"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {SCRIPT} "$@"\n')
    program.chmod(0o755)

    async def main(is_back):
        async with running(command=(str(program),)) as client:
            await client.wait_ready()
            hidden = program.rename(tmp_path / "away")
            os.kill(client.pid, signal.SIGKILL)
            await until(lambda: "could not be started" in client.state_reason)
            if is_back:
                hidden.rename(program)
                await client.wait_ready()
                assert len(await tokens_of(await client.submit(generate("again", [1, 2, 3])))) == 8
            else:
                with pytest.raises(ConfigError, match="could not be started"):
                    await client.wait_ready()
                assert client.state is EngineState.FAILED
                hidden.rename(program)

    run(lambda: main(True))
    run(lambda: main(False))


# --- frames


def test_frames_survive_any_cut():
    messages = [generate("a", range(50), stop=("é",)), CancelRequest("b"), Shutdown()]
    data = frames.encode_frame(messages[:2]) + frames.encode_frame([]) + frames.encode_frame(messages[2:])
    for size in (1, 3, 4, 5, 17, len(data)):
        reader = frames.FrameReader(ToEngine)
        got = [m for i in range(0, len(data), size) for m in reader.feed(data[i : i + size])]
        assert got == messages


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",
        frames.HEADER.pack(frames.MAX_FRAME_BYTES + 1),
        frames.HEADER.pack(1) + b"\xc1",
        frames.HEADER.pack(2) + b"\x91\x01",
        frames.HEADER.pack(5) + msgspec.msgpack.encode([[99, 1]]) + b"\x00\x00\x00\x00",
    ],
)
def test_nonsense_is_refused(data):
    with pytest.raises(frames.FrameError):
        frames.FrameReader(ToEngine).feed(data)


def test_a_frame_that_is_too_long_is_not_sent(monkeypatch):
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 100)
    with pytest.raises(frames.FrameError):
        frames.encode_frame([CancelRequest("x" * 100)])
