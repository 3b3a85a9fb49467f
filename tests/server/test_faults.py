"""The engine is killed, stopped and made to crash under load: each request hears of it, service resumes."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import psutil
import pytest

from helpers.crowd import Outcome, ask, client, completion
from helpers.server_process import ServerProcess
from helpers.soak import Soak

WATCHDOG_S = 8.0
SLACK_S = 2.0
"""For a machine that is busy with other things."""


@pytest.mark.parametrize(
    ("number", "found_s"),
    [(signal.SIGKILL, 1.0), (signal.SIGSEGV, 1.0), (signal.SIGSTOP, WATCHDOG_S + 1.0)],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else "",
)
def test_three_faults_in_a_row(number: signal.Signals, found_s: float) -> None:
    flags = ("--max-running-requests", "8", "--num-threads", "2", "--watchdog-timeout", str(WATCHDOG_S))
    with ServerProcess(*flags) as server:
        server.wait_ready()
        expected = asyncio.run(_one(server, completion("The sea", 12)))
        for _ in range(3):
            asyncio.run(_fault(server, number, found_s))
            again = asyncio.run(_one(server, completion("The sea", 12)))
            assert (again.status, again.text) == (200, expected.text), server.log[-2000:]
        assert server.stop() == 0
        assert "Traceback" not in server.log
        assert server.log.count("and is being restarted") == 3
        assert "was in the step that crashed" not in server.log, "a kill from outside makes no suspects"


async def _one(server: ServerProcess, body: dict[str, object]) -> Outcome:
    async with client(server.url) as http:
        return await ask(http, body)


async def _fault(server: ServerProcess, number: signal.Signals, found_s: float) -> None:
    async with client(server.url) as http:
        bodies = [completion(f"{i} says", 1500, stream=i % 2 == 0) for i in range(12)]  # 8 run, 4 wait
        crowd = [asyncio.create_task(ask(http, body)) for body in bodies]
        while (await http.get("/v1/loads")).json()["aggregate"]["num_running_reqs"] < 8:
            await asyncio.sleep(0.01)
        (engine,) = psutil.Process(server.process.pid).children()
        os.kill(engine.pid, number)
        start = time.monotonic()
        outcomes = await asyncio.wait_for(asyncio.gather(*crowd), 60)
        ended_s = time.monotonic() - start
        assert [outcome.code for outcome in outcomes] == ["engine_restarted"] * 12
        assert {outcome.status for outcome in outcomes} == {200, 503}
        assert all(outcome.has_retry_after for outcome in outcomes if outcome.status == 503)
        assert ended_s <= found_s + 2 + SLACK_S
        while (await http.get("/health")).status_code != 200:
            await asyncio.sleep(0.02)
            assert time.monotonic() - start < found_s + 10 + SLACK_S, "service is not back"


def test_a_short_soak() -> None:
    """The long one: pytest -m soak, or python -m helpers.soak."""
    report = Soak(
        seconds=8, num_clients=4, fault_every_s=(2, 3), num_threads=1, measured_after=(50, 150)
    ).run()
    assert report.problems == [], report.table()


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_soak_of_twenty_minutes() -> None:
    report = Soak(seconds=1200).run()
    print(report.table())
    assert report.problems == [], report.table()
