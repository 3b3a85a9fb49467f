"""Many clients of one server at once, and what is counted of them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import random
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import httpx
import psutil

PATH = "/v1/completions"


@dataclasses.dataclass
class Outcome:
    """How one request went. `code` is that of the error, in the body or in the stream."""

    status: int
    code: str | None = None
    text: str = ""
    finish_reasons: tuple[str | None, ...] = ()
    """Of every choice; None: its end did not come."""

    logprobs: tuple[float, ...] = ()
    """Of the tokens, choice by choice, if they were asked for."""

    has_retry_after: bool = False
    left: bool = False
    """The client went away in the middle."""

    seconds: float = 0.0
    ended_s: float = 0.0
    """When all of it was there; by the clock of the machine, as in the server's log."""

    @property
    def answer(self) -> tuple[object, ...]:
        """All that two answers to the same request must share, to the last bit."""
        return self.status, self.code, self.text, self.finish_reasons, self.logprobs


def client(url: str, **options: Any) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=url, limits=limits, timeout=120, trust_env=False, **options)


async def ask(
    http: httpx.AsyncClient, body: dict[str, Any], *, leaves_after_s: float | None = None
) -> Outcome:
    """One request to its end, which is exactly one answer or one error; or left in the middle."""
    start = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(leaves_after_s):
            outcome = await (_stream(http, body) if body.get("stream") else _whole(http, body))
    except TimeoutError:
        return Outcome(0, left=True)
    outcome.seconds = asyncio.get_running_loop().time() - start
    outcome.ended_s = time.time()
    return outcome


async def _whole(http: httpx.AsyncClient, body: dict[str, Any]) -> Outcome:
    answer = await http.post(PATH, json=body)
    return _outcome(answer.status_code, answer.json(), answer.headers)


async def _stream(http: httpx.AsyncClient, body: dict[str, Any]) -> Outcome:
    async with http.stream("POST", PATH, json=body) as answer:
        if answer.status_code != 200:
            return _outcome(answer.status_code, json.loads(await answer.aread()), answer.headers)
        choices: dict[int, list[dict[str, Any]]] = {i: [] for i in range(body.get("n", 1))}
        code, ends = None, []
        async for line in answer.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                ends.append("done")
                continue
            assert not ends, "an event after the last one"
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                assert code is None, "two errors"
                code = event["error"]["code"]
            else:
                assert code is None, "an event after an error"
                for choice in event["choices"]:
                    choices[choice["index"]].append(choice)
        assert ends == ["done"], "a stream without its end"
        return _answered([_joined(pieces) for _, pieces in sorted(choices.items())], code)


def _joined(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    """One choice out of its pieces in the stream."""
    reasons = [piece["finish_reason"] for piece in pieces if piece["finish_reason"] is not None]
    assert len(reasons) <= 1, "two ends of a choice"
    logprobs = [x for piece in pieces for x in (piece.get("logprobs") or {}).get("token_logprobs", [])]
    return {
        "text": "".join(piece["text"] for piece in pieces),
        "finish_reason": reasons[0] if reasons else None,
        "logprobs": {"token_logprobs": logprobs},
    }


def _answered(choices: list[dict[str, Any]], code: str | None = None) -> Outcome:
    logprobs = [x for choice in choices for x in (choice.get("logprobs") or {}).get("token_logprobs", [])]
    reasons = tuple(choice["finish_reason"] for choice in choices)
    assert code is not None or None not in reasons, "an answer that is cut short without an error"
    return Outcome(200, code, "".join(choice["text"] for choice in choices), reasons, tuple(logprobs))


def _outcome(status: int, body: dict[str, Any], headers: httpx.Headers) -> Outcome:
    if status == 200:
        return _answered(sorted(body["choices"], key=lambda choice: choice["index"]))
    return Outcome(status, body["error"]["code"], has_retry_after=int(headers.get("retry-after", 0)) >= 1)


def completion(prompt: str, max_tokens: int, **fields: Any) -> dict[str, Any]:
    """A greedy completion of exactly `max_tokens` tokens."""
    return {
        "model": "default",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        **fields,
    }


async def gather_limited(work: Iterable[Callable[[], Awaitable[Any]]], most: int) -> list[Any]:
    """All of `work`, at most so many at a time."""
    slots = asyncio.Semaphore(most)

    async def one(task: Callable[[], Awaitable[Any]]) -> Any:
        async with slots:
            return await task()

    return await asyncio.gather(*(one(task) for task in work))


def metrics(http: httpx.Client) -> dict[str, float]:
    """Every sample, by name and labels."""
    lines = http.get("/metrics").text.splitlines()
    return {name: float(value) for name, value in (x.rsplit(" ", 1) for x in lines if x[0] != "#")}


def refused(samples: dict[str, float], reason: str) -> float:
    return samples.get(f'engine:rejected_total{{reason="{reason}"}}', 0.0)


def proportional_bytes(pid: int) -> int:
    """Memory of a process and its descendants, pages that are shared divided among those who share them."""
    process = psutil.Process(pid)
    total = 0
    for one in (process, *process.children(recursive=True)):
        try:
            total += one.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return total


def held_bytes(pid: int) -> int:
    """Memory of a process and its descendants, what they share of their own divided among them, and all pages
    of files that each has mapped: what others do who have mapped the same files does not show here.
    """
    process = psutil.Process(pid)
    total = 0
    for one in (process, *process.children(recursive=True)):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            own, _, mapped = _memory(one)
            total += own + mapped
    return total


def _memory(process: psutil.Process) -> tuple[int, int, int]:
    """Proportional bytes of its own pages and those it shares with others of ours, and of pages of files; and
    all bytes of files, whoever else has mapped them.
    """
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
    kib = {line.split()[0]: int(line.split()[1]) for line in lines}
    anonymous_and_shared = kib["Pss_Anon:"] + kib["Pss_Shmem:"]
    return 1024 * anonymous_and_shared, 1024 * kib["Pss_File:"], 1024 * _rss_of_files(process)


def _rss_of_files(process: psutil.Process) -> int:
    """KiB."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssFile:"))


@dataclasses.dataclass(frozen=True)
class Held:
    """What a server that is idle holds: it and its descendants."""

    bytes: int
    """Proportional memory, without pages of files: those depend on what else the machine runs."""

    file_bytes: int
    """Proportional memory of those: programs, libraries, weights that are mapped."""

    mapped_bytes: int
    """The same, not divided among those who have mapped them: what others do does not show here."""

    descriptors: int
    threads: int
    tasks: int
    """Of the server's event loop."""

    @classmethod
    def by(cls, pid: int, http: httpx.Client) -> Held:
        num_tasks = http.get("/debug/state").json()["server"]["tasks"]
        process = psutil.Process(pid)
        all_of_them = (process, *process.children(recursive=True))
        own, of_files, mapped = map(sum, zip(*map(_memory, all_of_them), strict=True))
        num_fds = sum(one.num_fds() for one in all_of_them)
        num_threads = sum(one.num_threads() for one in all_of_them)
        return cls(own, of_files, mapped, num_fds, num_threads, num_tasks)

    @property
    def counts(self) -> tuple[int, int, int]:
        return self.descriptors, self.threads, self.tasks

    def is_back_to(self, idle: Held) -> bool:
        """Whether no more descriptors, threads and tasks are there than were."""
        return all(now <= before for now, before in zip(self.counts, idle.counts, strict=True))

    def is_flat_since(self, before: Held) -> bool:
        """Whether at most 2 % and 10 MB of memory came to it.

        Of files, all that came counts as its own: their proportional memory changes with who else runs.
        """
        grown = self.bytes - before.bytes + max(0, self.mapped_bytes - before.mapped_bytes)
        return grown <= min(0.02 * (before.bytes + before.file_bytes), 10 * 2**20)


def words(draw: random.Random, count: int) -> str:
    return " ".join(
        draw.choice(("sun", "sea", "owl", "red", "old", "far", "low", "big")) for _ in range(count)
    )
