"""The engine is killed, stopped and made to crash under load: each request hears of it, service resumes."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import json
import os
import signal
import time

import httpx
import pytest

from helpers import crashing_server
from helpers.crowd import Outcome, ask, client, completion, metrics
from helpers.http_server import DEADLINE_S
from helpers.kept_waiting import kept_waiting_s
from helpers.server_process import ServerProcess
from helpers.soak import Soak

WATCHDOG_S = 8.0
FLAGS = ("--max-running-requests", "8", "--num-threads", "2", "--watchdog-timeout", str(WATCHDOG_S))


@dataclasses.dataclass(frozen=True)
class Probe:
    """One look at /health; times by the clock of the machine, as in the server's log."""

    sent_s: float
    answered_s: float
    status: int


@pytest.mark.parametrize(
    ("number", "found_s"),
    [(signal.SIGKILL, 1.0), (signal.SIGSEGV, 1.0), (signal.SIGSTOP, WATCHDOG_S + 1.0)],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else "",
)
def test_three_faults_in_a_row(number: signal.Signals, found_s: float) -> None:
    """Found out in time, within 2 s of which each request has its error, and service back within 10 s; more
    only where they, or this test, were kept waiting for a core: others use the machine as well.
    """
    with ServerProcess(*FLAGS) as server:
        server.wait_ready()
        expected = asyncio.run(_one(server, completion("The sea", 12, logprobs=1)))
        for _ in range(3):
            asyncio.run(_fault(server, number, found_s))
            again = asyncio.run(_one(server, completion("The sea", 12, logprobs=1)))
            assert again.answer == expected.answer, server.log[-2000:]
        assert metrics(server.http)["engine:engine_restarts_total"] == 3
        assert server.stop() == 0
        assert "Traceback" not in server.log
        assert server.log.count("and is being restarted") == 3
        makes_suspects = "was in the step that crashed" in server.log
        assert not makes_suspects, f"a kill from outside makes none:\n{server.log}"


async def _one(server: ServerProcess, body: dict[str, object]) -> Outcome:
    async with client(server.url) as http:
        return await ask(http, body)


async def _fault(server: ServerProcess, number: signal.Signals, found_s: float) -> None:
    num_chars_before = len(server.log)
    async with client(server.url) as http:
        bodies = [completion(f"{i} says", 2000, stream=i % 2 == 0) for i in range(12)]  # 8 run, 4 wait
        crowd = [asyncio.create_task(ask(http, body)) for body in bodies]
        while (await http.get("/v1/loads")).json()["aggregate"]["num_running_reqs"] < 8:
            await asyncio.sleep(0.01)
        dead, waited_s = server.engine, kept_waiting_s(os.getpid(), server.process.pid)
        killed_s = time.time()
        dead.send_signal(number)
        probes = asyncio.create_task(_look_until_back(http))
        outcomes = await asyncio.wait_for(asyncio.gather(*crowd), DEADLINE_S)
        assert [outcome.code for outcome in outcomes] == ["engine_restarted"] * 12
        assert {outcome.status for outcome in outcomes} == {200, 503}
        assert all(outcome.has_retry_after for outcome in outcomes if outcome.status == 503)
        *healthy, ill, back = await asyncio.wait_for(probes, DEADLINE_S)
        assert (ill.status, back.status) == (503, 200)
    waited_s = kept_waiting_s(os.getpid(), server.process.pid, server.engine.pid) - waited_s
    found_s, told_s, back_s = found_s + waited_s, 2 + waited_s, 10 + waited_s
    lines = server.log[num_chars_before:].splitlines()
    (found,) = [_time_of(line) for line in lines if "and is being restarted" in line]
    assert killed_s <= found <= killed_s + found_s
    ended = [json.loads(line)["time"] for line in lines if '"code":"engine_restarted"' in line]
    assert len(ended) == 12 and found - 0.1 <= min(ended) and max(ended) <= found + told_s
    assert all(outcome.ended_s <= found + told_s for outcome in outcomes), "a client heard of it late"
    assert all(probe.sent_s <= killed_s + found_s for probe in healthy), "/health said ok for too long"
    assert back.answered_s <= found + back_s, "service is not back"


def _time_of(line: str) -> float:
    """Of a line of the log."""
    return datetime.datetime.fromisoformat(line[:23]).timestamp()


async def _look_until_back(http: httpx.AsyncClient) -> list[Probe]:
    """The looks that said ok still, the last one that did not, and the first that did again."""
    healthy: list[Probe] = []
    ill: Probe | None = None
    while True:
        sent_s = time.time()
        probe = Probe(sent_s, time.time(), (await http.get("/health")).status_code)
        probe = dataclasses.replace(probe, answered_s=time.time())
        if probe.status != 200:
            ill = probe
        elif ill is not None:
            return [*healthy, ill, probe]
        else:
            healthy.append(probe)
        await asyncio.sleep(0.02)


def test_a_request_that_crashes_the_engine_is_found_and_refused() -> None:
    """A segmentation fault in a step of the real engine, over HTTP, beside others who did nothing wrong."""
    program = [*crashing_server.COMMAND]
    deadly = completion("", 5) | {"prompt": [*crashing_server.DEADLY, 20, 21]}
    good = [completion(f"{name} says", 60, logprobs=1) for name in ("The owl", "The sea")]
    with ServerProcess(*FLAGS, program=program) as server:
        server.wait_ready()
        expected = [asyncio.run(_one(server, body)) for body in good]
        asyncio.run(_crash_in_company(server, deadly, good))
        server.wait_ready()
        assert server.log.count("was in the step that crashed the engine") == 3

        async def again() -> list[Outcome]:
            async with client(server.url) as http:
                return list(await asyncio.gather(*(ask(http, body) for body in good)))

        assert [outcome.answer for outcome in asyncio.run(again())] == [o.answer for o in expected]
        alone = _post(server, deadly, "the culprit")
        assert (alone.status_code, alone.json()["error"]["code"]) == (503, "engine_restarted")
        server.wait_ready()
        (line,) = [x for x in server.log.splitlines() if "crashes the engine and is refused from now on" in x]
        assert "(x-request-id the culprit)" in line
        engine = server.engine
        for stream in (False, True):
            refused = _post(server, {**deadly, "stream": stream}, "again")
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "request_crashes_engine")
        assert [outcome.answer for outcome in asyncio.run(again())] == [o.answer for o in expected]
        assert engine.is_running() and server.http.get("/debug/state").json()["server"]["restarts"] == 2
        assert server.log.count("the engine was killed by SIGSEGV and is being restarted") == 2
        assert server.stop() == 0
    assert "Traceback" not in server.log


def _post(server: ServerProcess, body: dict[str, object], trace_id: str) -> httpx.Response:
    return server.http.post("/v1/completions", json=body, headers={"x-request-id": trace_id})


async def _crash_in_company(
    server: ServerProcess, deadly: dict[str, object], good: list[dict[str, object]]
) -> None:
    async with client(server.url) as http:
        company = [asyncio.create_task(ask(http, {**body, "max_tokens": 2000})) for body in good]
        while (await http.get("/v1/loads")).json()["aggregate"]["num_running_reqs"] < len(good):
            await asyncio.sleep(0.01)
        outcomes = [await ask(http, deadly), *await asyncio.gather(*company)]
    assert [(o.status, o.code) for o in outcomes] == [(503, "engine_restarted")] * 3


def test_a_short_soak() -> None:
    """The long one: pytest -m soak, or python -m helpers.soak."""
    report = Soak(
        seconds=8, num_clients=4, fault_every_s=(2, 3), num_threads=1, measured_after=(50, 150), idle_s=5
    ).run()
    assert report.problems == [], report.table()


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_soak_of_twenty_minutes() -> None:
    report = Soak(seconds=1200).run()
    print(report.table())
    assert report.problems == [], report.table()
