"""What every serving bench does: find the server, warm up and check, time rounds, report.

A bench file defines one `Workload`, whose coroutine `run(client, random)` asks what the workload asks and
returns the answers. Prompts are drawn anew for each round, from a fixed seed, so that no round finds the
prefixes of another in the cache.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import random
import statistics
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from client import Answer, Client, Completion
from harness import machine, report
from own_server import CpuTime, OwnServer, shaped_checkpoint

Run = Callable[[Client, random.Random], Awaitable[list[Answer]]]

SEED = 2026
FIRST_ID, LAST_ID = 300, 3999  # ordinary tokens of the bundled model, and of any larger vocabulary
WARM_UP = -1


@dataclasses.dataclass(frozen=True)
class Workload:
    """What one bench asks. `figure`: which of its figures it is about. `fields` go into every request."""

    name: str
    run: Run
    figure: str
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def request_fields(self) -> dict[str, Any]:
        """Special tokens are shown so that every token has a text, and so a time."""
        return {"skip_special_tokens": False, **self.fields}


def prompt(draw: random.Random, length: int) -> list[int]:
    return [draw.randint(FIRST_ID, LAST_ID) for _ in range(length)]


async def at_once(
    client: Client, prompts: Sequence[list[int]], max_tokens: int, num_workers: int
) -> list[Answer]:
    """Complete all prompts in order, `num_workers` at a time."""
    waiting = iter(prompts)

    async def work() -> list[Answer]:
        return [await client.complete(ids, max_tokens) for ids in waiting]

    answers = await asyncio.gather(*(work() for _ in range(num_workers)))
    return [answer for some in answers for answer in some]


def arguments(description: str) -> argparse.Namespace:
    """What every bench of one server is told."""
    parser = argparse.ArgumentParser(
        description=description.splitlines()[0],
        epilog="Without --base-url our own server is started on a free port, with the flags that come "
        "after -- (default: --num-threads 2).",
    )
    parser.add_argument("--base-url", help="a running server of any kind, as http://127.0.0.1:8000")
    parser.add_argument("--model", default="default", help="its name of the model")
    parser.add_argument("--api-key", default="EMPTY")
    parser.add_argument("--shape", help="serve random weights of this shape (qwen05: qwen05.json here)")
    parser.add_argument(
        "--extra", type=json.loads, default={}, help="JSON object with more fields for every request"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("flags", nargs="*", help="flags of our server")
    return parser.parse_args()


@contextlib.contextmanager
def served(args: argparse.Namespace) -> Iterator[tuple[str, OwnServer | None]]:
    """The address of the server to ask, and ours, which is started, where none is named."""
    if args.base_url is not None:
        yield args.base_url, None
        return
    with contextlib.ExitStack() as stack:
        flags = args.flags or ["--num-threads", "2"]
        if args.shape:
            shape = Path(__file__).with_name(f"{args.shape}.json")
            directory = stack.enter_context(shaped_checkpoint(shape))
            flags = [*flags, "--model-path", str(directory), "--load-format", "dummy"]
        server = OwnServer(flags)
        stack.callback(server.stop)
        yield server.base_url, server


def main(workload: Workload, description: str) -> None:
    """The command line of one bench."""
    args = arguments(description)
    with served(args) as (base_url, server):
        client = Client(base_url, args.model, args.api_key, **{**workload.request_fields(), **args.extra})
        rounds = asyncio.run(_measure(client, workload, args.rounds, server))
    show(workload.name, args, rounds)


async def _measure(
    client: Client, workload: Workload, num_rounds: int, server: OwnServer | None
) -> list[dict[str, float]]:
    try:
        return [
            figures
            for index in range(WARM_UP, num_rounds)
            for figures in [await measure_round(client, workload, index, server)]
            if index != WARM_UP
        ]
    finally:
        client.close()


async def measure_round(
    client: Client, workload: Workload, index: int, server: OwnServer | None = None
) -> dict[str, float]:
    """One round, checked, in figures; CPU time only of a `server` of ours. Raises: `BadAnswer`."""
    draw = random.Random(f"{SEED} {workload.name} {index}")
    cpu_before = server.cpu_time() if server else None
    client_before_s, began_s = process_time(), perf_counter()
    answers = await workload.run(client, draw)
    wall_s, client_s = perf_counter() - began_s, process_time() - client_before_s
    cpu = server.cpu_time() - cpu_before if server and cpu_before else None
    return figures_of([answer.read() for answer in answers], wall_s, client_s, cpu)


def figures_of(
    completions: list[Completion], wall_s: float, client_s: float, cpu: CpuTime | None
) -> dict[str, float]:
    num_tokens = sum(c.num_tokens for c in completions)
    ttft_ms = [c.ttft_s * 1e3 for c in completions]
    gaps_ms = [gap * 1e3 for c in completions for gap in c.gaps_s]
    figures = {
        "output_tok_s": num_tokens / wall_s,
        "requests_s": len(completions) / wall_s,
        "prefill_tok_s": sum(c.prompt_len for c in completions) / sum(c.ttft_s for c in completions),
        "ttft_p50_ms": statistics.median(ttft_ms),
        "ttft_p99_ms": percentile(ttft_ms, 99),
    }
    if decode_s := sum(c.text_s[-1] - c.text_s[0] for c in completions):
        figures["decode_tok_s"] = sum(c.num_tokens - 1 for c in completions) / decode_s
    if gaps_ms:  # none of which took any time where all came at once
        figures |= {
            "itl_p50_ms": statistics.median(gaps_ms),
            "itl_p99_ms": percentile(gaps_ms, 99),
        }
    figures["client_cpu_us_per_token"] = client_s / num_tokens * 1e6
    if cpu is not None:
        for part, seconds in (
            ("server", cpu.server_s),
            ("engine", cpu.engine_s),
            ("kernels", cpu.kernels_s),
            ("own", cpu.own_s),
        ):
            figures[f"{part}_cpu_us_per_token"] = seconds / num_tokens * 1e6
    return figures


def percentile(samples: list[float], percent: int) -> float:
    """The smallest sample that at least `percent` of them do not exceed."""
    return sorted(samples)[-(-len(samples) * percent // 100) - 1]


def show(name: str, args: argparse.Namespace, rounds: list[dict[str, float]]) -> None:
    """Print the median and the range of each figure, and the result line."""
    results: dict[str, Any] = {}
    print(f"{machine()}\n{name}, {len(rounds)} rounds after one of warming up\n")
    print(f"{'':26}    median    lowest   highest")
    for figure in rounds[0]:
        samples = [one[figure] for one in rounds]
        results[figure] = statistics.median(samples)
        results[f"{figure}_range"] = [min(samples), max(samples)]
        print(f"{figure:26}{results[figure]:10.2f}{min(samples):10.2f}{max(samples):10.2f}")
    if "own_cpu_us_per_token" in results:
        print("\nown = server + engine - kernels: CPU time outside of the forward's native code")
    print()
    setting = {"base_url": args.base_url, "shape": args.shape, "flags": args.flags, "rounds": args.rounds}
    report(f"serving_{name}", {**setting, **results})
