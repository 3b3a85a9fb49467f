"""Many clients of one server at once, and what is counted of them."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
from collections.abc import Awaitable, Callable, Iterable
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
    has_retry_after: bool = False
    left: bool = False
    """The client went away in the middle."""

    seconds: float = 0.0


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
    return outcome


async def _whole(http: httpx.AsyncClient, body: dict[str, Any]) -> Outcome:
    answer = await http.post(PATH, json=body)
    return _outcome(answer.status_code, answer.json(), answer.headers)


async def _stream(http: httpx.AsyncClient, body: dict[str, Any]) -> Outcome:
    async with http.stream("POST", PATH, json=body) as answer:
        if answer.status_code != 200:
            return _outcome(answer.status_code, json.loads(await answer.aread()), answer.headers)
        texts, code, ends = [], None, []
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
                texts += [choice["text"] for choice in event["choices"]]
        assert ends == ["done"], "a stream without its end"
        return Outcome(200, code, "".join(texts))


def _outcome(status: int, body: dict[str, Any], headers: httpx.Headers) -> Outcome:
    if status == 200:
        return Outcome(status, text="".join(choice["text"] for choice in body["choices"]))
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
    """Memory of a process and its descendants, what they share counted once."""
    process = psutil.Process(pid)
    total = 0
    for one in (process, *process.children(recursive=True)):
        try:
            total += one.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return total


def handles(pid: int) -> tuple[int, int]:
    """Open descriptors and threads of a process and its descendants."""
    process = psutil.Process(pid)
    all_of_them = (process, *process.children(recursive=True))
    return sum(one.num_fds() for one in all_of_them), sum(one.num_threads() for one in all_of_them)


def words(draw: random.Random, count: int) -> str:
    return " ".join(
        draw.choice(("sun", "sea", "owl", "red", "old", "far", "low", "big")) for _ in range(count)
    )
