"""Mixed traffic for a long time, with faults at random: nothing may be lost, wrong, or kept.

PYTHONPATH=python:tests python -m helpers.soak --minutes 20
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import os
import random
import signal
import time
from collections import Counter
from typing import Any

import httpx
import psutil

from helpers.crowd import Held, Outcome, ask, client, completion, gather_limited, metrics, words
from helpers.http_server import DEADLINE_S
from helpers.kept_waiting import kept_waiting_s
from helpers.server_process import ServerProcess

EXPECTED_ERRORS = {
    "engine_restarted",
    "queue_full",
    "context_length_exceeded",
    "invalid_value",
    "request_aborted",
    "model_loading",
}
FAULTS = ("SIGKILL", "SIGSEGV", "SIGSTOP", "abort all")
WATCHDOG_S = 8.0
FOUND_S = {"SIGKILL": 1.0, "SIGSEGV": 1.0, "SIGSTOP": WATCHDOG_S + 1.0}
"""The longest time until the server knows of a fault of the engine."""
BACK_S = 10.0
"""From then on: the longest time until it serves again."""
NUM_KNOWN = 24
ABORTED = "ended by /abort_request, which the answer says"


@dataclasses.dataclass
class Report:
    """What happened. `problems` is empty when nothing that must not happen did."""

    seconds: float
    outcomes: Counter[str] = dataclasses.field(default_factory=Counter)
    faults: Counter[str] = dataclasses.field(default_factory=Counter)
    recovery_s: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """By fault: times until /health said ok again."""

    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)

    def table(self) -> str:
        """For docs/reliability.md."""
        rows = [("duration", f"{self.seconds:.0f} s"), ("requests", sum(self.outcomes.values()))]
        rows += sorted((f"- {name}", count) for name, count in self.outcomes.items())
        rows += sorted((f"fault: {name}", count) for name, count in self.faults.items())
        rows += [
            (
                f"longest time from {fault} until /health said ok again",
                f"{max(times):.1f} s (allowed: {FOUND_S[fault]:g} s to find it, and {BACK_S:g} s)",
            )
            for fault, times in sorted(self.recovery_s.items())
        ]
        rows += list(self.facts.items())
        rows.append(("problems", "; ".join(self.problems) or "none"))
        lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
        return "\n".join(lines)


class Soak:
    """One run against a server of its own, with the bundled model."""

    def __init__(
        self,
        *,
        seconds: float,
        num_clients: int = 24,
        fault_every_s: tuple[float, float] = (40.0, 110.0),
        num_threads: int = 2,
        seed: int = 1,
        measured_after: tuple[int, ...] = (2000, 10_000),
        idle_s: float = 30.0,
    ) -> None:
        """What the server holds is measured before any request, and after as many as `measured_after` tells.
        It does not end before the last of these, however long that takes. The client's library forgets a
        connection now and then when a request is left in the middle: the server closes it after `idle_s`.
        """
        self._seconds = seconds
        self._num_clients = num_clients
        self._fault_every_s = fault_every_s
        self._flags = (
            "--max-running-requests", "8", "--max-queued-requests", "16", "--max-total-tokens", "8192",
            "--watchdog-timeout", str(WATCHDOG_S), "--num-threads", str(num_threads),
            "--limit", f"idle_s={idle_s}",
        )  # fmt: skip
        self._settle_s = idle_s + 20
        self._draw = random.Random(seed)
        self._report = Report(seconds)
        self._known: dict[int, Outcome] = {}
        self._measured_after = measured_after
        self._held: list[Held] = []
        self._num_requests = self._num_in_flight = self._num_compared = 0
        self._may_ask = asyncio.Event()
        self._calm = asyncio.Lock()
        """Held by a fault until it is over, and while nothing may disturb a measurement."""

    def run(self) -> Report:
        with ServerProcess(*self._flags) as server:
            server.wait_ready()
            self._server, self._pid = server, server.process.pid
            asyncio.run(self._traffic())
            self._check_end()
            if server.stop() != 0:
                self._problem("the server did not end with 0")
            if "Traceback" in server.log:
                self._problem("a traceback in the log")
        return self._report

    # --- traffic

    async def _traffic(self) -> None:
        async with client(self._server.url) as http:
            for i in range(NUM_KNOWN):
                self._known[i] = await ask(http, self._known_body(i))
            await self._measure(http)
            self._end_s = time.monotonic() + self._seconds
            tasks = [asyncio.create_task(self._client(http, i)) for i in range(self._num_clients)]
            faults = asyncio.create_task(self._faults(http))
            measurements = asyncio.create_task(self._measurements(http))
            await asyncio.gather(*tasks)
            await measurements
            async with self._calm:
                faults.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await faults

    @property
    def _is_over(self) -> bool:
        return time.monotonic() >= self._end_s and self._num_requests >= self._measured_after[-1]

    def _known_body(self, i: int, **fields: Any) -> dict[str, Any]:
        prompt = f"{words(random.Random(i), 3)} {i}"
        return completion(prompt, 8 + 3 * i, seed=i, temperature=i % 2, logprobs=1) | fields

    async def _client(self, http: httpx.AsyncClient, number: int) -> None:
        draw = random.Random(number)
        while not self._is_over:
            await self._may_ask.wait()
            self._num_requests += 1
            known = draw.randrange(NUM_KNOWN) if draw.random() < 0.5 else None
            leaves_after_s = None if known is not None or draw.random() < 0.6 else draw.uniform(0.005, 1)
            body = self._random_body(draw) if known is None else self._known_body(known)
            body["stream"] = draw.random() < 0.5
            self._num_in_flight += 1
            try:
                outcome = await ask(http, body, leaves_after_s=leaves_after_s)
            except (httpx.HTTPError, AssertionError) as error:
                self._problem(f"a request was lost: {type(error).__name__} {error}")
                continue
            finally:
                self._num_in_flight -= 1
            self._note(outcome)
            if known is not None:
                self._compare(outcome, known)
            if outcome.status == 503:
                await asyncio.sleep(draw.uniform(0.05, 0.3))

    def _random_body(self, draw: random.Random) -> dict[str, Any]:
        kind = draw.random()
        if kind < 0.05:
            return completion("x", 5, temperature=-1)
        if kind < 0.1:
            return completion(words(draw, 3000), 5)
        if kind < 0.3:
            return completion(
                "The same beginning. " * 20 + words(draw, 4), draw.randrange(1, 60), n=draw.randrange(1, 5)
            )
        if kind < 0.4:
            return completion("x", 20, ignore_eos=False, regex=f"[a-f]{{{draw.randrange(2, 9)}}}")
        return completion(
            words(draw, draw.randrange(1, 200)), draw.randrange(1, 120), temperature=1, logprobs=2
        )

    def _compare(self, outcome: Outcome, known: int) -> None:
        """What came of a request whose answer is known is that answer, or the beginning of it and says so."""
        expected = self._known[known]
        is_cut = outcome.code is not None or "abort" in outcome.finish_reasons
        if is_cut:
            is_right = expected.text.startswith(outcome.text)
        else:
            is_right = outcome.left or outcome.answer == expected.answer
            self._num_compared += not outcome.left
        if not is_right:
            self._problem(f"a wrong answer to number {known}: {outcome}")

    def _note(self, outcome: Outcome) -> None:
        if outcome.left:
            name = "left in the middle by the client"
        elif "abort" in outcome.finish_reasons:
            name = ABORTED
            if not self._report.faults["abort all"]:
                self._problem("an answer was aborted by nobody")
        elif outcome.code is None:
            name = "answered"
        else:
            name = f"{outcome.code} ({'in the stream' if outcome.status == 200 else outcome.status})"
            if outcome.code not in EXPECTED_ERRORS:
                self._problem(f"unexpected error {outcome.code}")
            if outcome.status == 503 and not outcome.has_retry_after:
                self._problem("a 503 without Retry-After")
        self._report.outcomes[name] += 1

    # --- faults

    async def _faults(self, http: httpx.AsyncClient) -> None:
        turn = 0
        while True:
            await asyncio.sleep(self._draw.uniform(*self._fault_every_s))
            fault = FAULTS[turn % len(FAULTS)]
            turn += 1
            async with self._calm:
                self._report.faults[fault] += 1
                await self._inject(fault, http)

    async def _inject(self, fault: str, http: httpx.AsyncClient) -> None:
        if fault == "abort all":
            await http.post("/abort_request", json={"abort_all": True})
            return
        engine, waited_s = self._server.engine, kept_waiting_s(os.getpid(), self._pid)
        engine.send_signal(signal.Signals[fault])
        start = time.monotonic()
        while engine in psutil.Process(self._pid).children():  # until the server knows of its death
            await asyncio.sleep(0.02)
        await self._wait_healthy(http)
        seconds = time.monotonic() - start
        # More only where they were kept waiting: others may use the machine as well.
        waited_s = kept_waiting_s(os.getpid(), self._pid, self._server.engine.pid) - waited_s
        self._report.recovery_s.setdefault(fault, []).append(seconds)
        if seconds > FOUND_S[fault] + BACK_S + waited_s:
            self._problem(f"{seconds:.1f} s after {fault} until /health said ok again")

    async def _wait_healthy(self, http: httpx.AsyncClient) -> None:
        while not await self._is_healthy(http):
            await asyncio.sleep(0.02)

    async def _is_healthy(self, http: httpx.AsyncClient) -> bool:
        try:
            return (await http.get("/health")).status_code == 200
        except httpx.HTTPError as error:
            self._problem(f"/health had no answer: {type(error).__name__} {error}")
            return False

    # --- what the server holds, and what is left at the end

    async def _measurements(self, http: httpx.AsyncClient) -> None:
        for num_requests in self._measured_after:
            while self._num_requests < num_requests:
                await asyncio.sleep(0.02)
            await self._measure(http)

    async def _measure(self, http: httpx.AsyncClient) -> None:
        """With nothing in flight, and the same things done before, however young the engine is."""
        async with self._calm:
            self._may_ask.clear()
            while self._num_in_flight:
                await asyncio.sleep(0.02)
            await self._wait_healthy(http)
            draw = random.Random(0)
            fills = [completion(words(draw, 200), 40, regex="[a-z ]*", n=2) for _ in range(40)]
            await gather_limited([lambda body=body: ask(http, body) for body in fills], 4)
            self._held.append(await asyncio.to_thread(self._settled))
            self._may_ask.set()

    def _settled(self) -> Held:
        """Once connections and tasks that came to their end are cleared away, which takes a moment."""
        deadline = time.monotonic() + self._settle_s
        while True:
            held = Held.by(self._pid, self._server.http)
            first = self._held[0] if self._held else held
            if held.is_back_to(first):
                return held
            if time.monotonic() > deadline:
                self._problem(f"descriptors, threads, tasks: {first.counts} before, {held.counts} after")
                return held
            time.sleep(0.05)

    def _check_end(self) -> None:
        http, facts = self._server.http, self._report.facts
        deadline = time.monotonic() + DEADLINE_S
        while (load := http.get("/v1/loads").json()["aggregate"])["num_total_reqs"]:
            if time.monotonic() > deadline:
                self._problem(f"requests are left: {load}")
                break
            time.sleep(0.05)
        state = http.get("/debug/state").json()
        blocks = state["engine"]["blocks"]
        if blocks["in_use"] or blocks["free"] + blocks["cached"] != blocks["total"]:
            self._problem(f"blocks are lost: {blocks}")
        if state["server"]["live_requests"]:
            self._problem("the server still counts requests as live")
        first, before, after = self._held[0], *self._held[-2:]
        facts["answers compared, bit for bit, with the one got alone"] = self._num_compared
        facts[f"proportional memory of all processes after {self._measured_after[-2]:,} requests"] = (
            f"{_mb(before.bytes)}, and {_mb(before.file_bytes)} of files"
        )
        grown = after.bytes - before.bytes
        facts[f"- after {self._measured_after[-1]:,}"] = (
            f"{_mb(grown, '+')} ({grown / before.bytes:+.2%}), "
            f"and {_mb(after.file_bytes - before.file_bytes, '+')} of files, "
            f"of which {_mb(after.mapped_bytes - before.mapped_bytes, '+')} more are mapped"
        )
        if not after.is_flat_since(before):
            self._problem("memory grew")
        facts["descriptors, threads, tasks before the first request, and then"] = (
            f"{first.counts}, {after.counts}"
        )
        num_restarts = int(metrics(http)["engine:engine_restarts_total"])
        facts["engine restarts counted"] = num_restarts
        if num_restarts != self._report.faults.total() - self._report.faults["abort all"]:
            self._problem(f"{num_restarts} restarts of the engine, after {dict(self._report.faults)}")

    def _problem(self, text: str) -> None:
        if len(self._report.problems) < 20:
            self._report.problems.append(text)


def _mb(num_bytes: int, sign: str = "") -> str:
    return f"{num_bytes / 2**20:{sign}.1f} MB"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    report = Soak(seconds=60 * parser.parse_args().minutes).run()
    print(report.table())
    raise SystemExit(bool(report.problems))
