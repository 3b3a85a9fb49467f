"""How soon the server is ready, and the most memory it ever has: from a checkpoint and from --packed-cache.

    python bench/serving/bench_start.py --model-path WEIGHTS/qwen05 [--formats none int8 int4] [-- FLAGS]

Files are warm: they have been read just before. The time is that from starting the process to 200 from
/health, the median of the rounds. Memory is the proportional resident memory (PSS) of all processes, looked
at every few milliseconds in a start of its own, because looking costs time, and while a prompt of 1,024
tokens is computed. Its bound is what the packed weights and the KV cache take and 450 MB; those of time are
for half a billion parameters and a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple
from urllib.request import Request, urlopen

from engines import process_tree, pss_bytes
from own_server import OwnServer
from workload import machine, report

CHECKPOINT_S, PACKED_S, OTHER_MB = 6.0, 3.0, 450.0
KV_TOKENS = 8192
PROMPT_TOKENS = 1024
_LOOK_S = 0.01


class PeakMemory:
    """The largest sum of the PSS of what this process has started, from entering on."""

    def __enter__(self) -> PeakMemory:
        self.peak_mb = 0.0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._is_over.wait(_LOOK_S):
            now_mb = sum(map(pss_bytes, process_tree(os.getpid())[1:])) / 1e6
            self.peak_mb = max(self.peak_mb, now_mb)


class Start(NamedTuple):
    ready_s: float
    cpu_s: float  # of all processes, stopping included: what a busy machine does not change


def start(argv: list[str]) -> Start:
    begin, cpu_before = time.monotonic(), _cpu_s_of_children()
    server = OwnServer(argv)
    taken = time.monotonic() - begin
    server.stop()
    return Start(taken, _cpu_s_of_children() - cpu_before)


def _cpu_s_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def peak_mb(argv: list[str]) -> float:
    with PeakMemory() as memory:
        server = OwnServer(argv)
        body = {"model": "default", "prompt": list(range(300, 300 + PROMPT_TOKENS)), "max_tokens": 16}
        headers = {"content-type": "application/json"}
        request = Request(f"{server.base_url}/v1/completions", json.dumps(body).encode(), headers)
        with urlopen(request, timeout=300) as answer:
            answer.read()
        server.stop()
    return memory.peak_mb


def kv_mb(model: Path) -> float:
    """What `KV_TOKENS` tokens take in bfloat16."""
    config = json.loads((model / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    heads = config.get("num_key_value_heads", config["num_attention_heads"])
    return KV_TOKENS * config["num_hidden_layers"] * heads * head_dim * 2 * 2 / 1e6


def measure(stored: str, args: argparse.Namespace) -> list[dict]:
    flags = [
        "--model-path",
        str(args.model_path),
        "--quantization",
        stored,
        "--max-total-tokens",
        str(KV_TOKENS),
    ]
    flags += args.flags
    results = []
    with tempfile.TemporaryDirectory() as folder:
        packed = [*flags, "--packed-cache", folder]
        start(packed)  # writes the cache, and warms the files of the checkpoint
        weights_mb = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / 1e6
        for source, argv, most_s in (("checkpoint", flags, CHECKPOINT_S), ("packed", packed, PACKED_S)):
            starts = [start(argv) for _ in range(args.rounds)]
            taken = statistics.median(one.ready_s for one in starts)
            cpu_s = statistics.median(one.cpu_s for one in starts)
            memory, most_mb = peak_mb(argv), weights_mb + kv_mb(args.model_path) + OTHER_MB
            results.append(
                {
                    "format": stored,
                    "source": source,
                    "ready_s": taken,
                    "cpu_s": cpu_s,
                    "most_s": most_s,
                    "peak_mb": memory,
                }
                | {"most_mb": most_mb, "reached": taken < most_s and memory <= most_mb}
            )
            print(
                f"{stored:8} {source:10} {taken:8.2f} {most_s:9.1f} {cpu_s:8.2f} {memory:9.0f} {most_mb:9.0f}"
                f"  {'pass' if results[-1]['reached'] else 'FAIL'}",
                flush=True,
            )
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", type=Path, required=True)
    parser.add_argument("--formats", nargs="+", default=["none", "int8", "int4"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("flags", nargs="*", help="flags of the server (default: --num-threads 2)")
    args = parser.parse_args()
    args.flags = args.flags or ["--num-threads", "2"]
    print(f"{machine()}\n\nformat   from          ready,s   at most    CPU,s   peak,MB   at most")
    results = [result for stored in args.formats for result in measure(stored, args)]
    report("start", {"model": str(args.model_path), "flags": args.flags, "starts": results})
    return int(not all(result["reached"] for result in results))


if __name__ == "__main__":
    raise SystemExit(main())
