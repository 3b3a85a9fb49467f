"""What benches share that ask several servers of ours in turns: start them, and show all rounds of each."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from client import Answer, Client
from own_server import OwnServer, shaped_checkpoint
from workload import machine, report

Rounds = dict[str, list[dict[str, float]]]
"""Figures of each round, by what was measured."""


class Demand(NamedTuple):
    """The median of a figure has to be at most, or at least, so much."""

    name: str
    figure: str
    most: float = math.inf
    least: float = -math.inf

    @property
    def bound(self) -> str:
        return f"at most {self.most}" if self.least == -math.inf else f"at least {self.least}"

    def holds(self, value: float) -> bool:
        return self.least <= value <= self.most


async def wave(client: Client, prompts: Sequence[list[int]], limits: Sequence[int]) -> list[Answer]:
    """Complete all prompts at once, each with its own number of tokens."""
    return await asyncio.gather(*map(client.complete, prompts, limits))


def main(
    name: str,
    description: str,
    servers: Mapping[str, Sequence[str]],
    measure: Callable[[dict[str, OwnServer], argparse.Namespace], Awaitable[Rounds]],
    demands: Sequence[Demand] = (),
) -> int:
    """The command line of one bench; `servers` are the flags of each. The exit status: 1 if a demand is
    missed."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--shape", help="serve random weights of this shape (qwen05: qwen05.json here)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("flags", nargs="*", help="flags of the servers (default: --num-threads 2)")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        flags = args.flags or ["--num-threads", "2"]
        if args.shape:
            shape = Path(__file__).with_name(f"{args.shape}.json")
            directory = stack.enter_context(shaped_checkpoint(shape))
            flags = [*flags, "--model-path", str(directory), "--load-format", "dummy"]
        started = {}
        for server, more in servers.items():
            started[server] = OwnServer([*flags, *more])
            stack.callback(started[server].stop)
        rounds = asyncio.run(measure(started, args))
    return _show(name, args, rounds, demands)


def _show(name: str, args: argparse.Namespace, rounds: Rounds, demands: Sequence[Demand]) -> int:
    results: dict[str, Any] = {}
    print(f"{machine()}\n{name}, {args.rounds} rounds after one of warming up\n")
    print(f"{'':40}    median    lowest   highest")
    for measured, figures in rounds.items():
        for figure in figures[0]:
            samples = [one[figure] for one in figures]
            results[f"{measured}_{figure}"] = statistics.median(samples)
            shown = f"{statistics.median(samples):10.3f}{min(samples):10.3f}{max(samples):10.3f}"
            print(f"{measured + ' ' + figure:40}{shown}")
    print()
    holds = {}
    for demand in demands:
        label, value = f"{demand.name} {demand.figure}", results[f"{demand.name}_{demand.figure}"]
        holds[label] = demand.holds(value)
        print(f"{'pass' if holds[label] else 'FAIL'}  {label} {value:.3f}, {demand.bound}")
    about = {"shape": args.shape, "flags": args.flags, "rounds": args.rounds}
    report(f"serving_{name}", {**about, **results, **({"demands": holds} if demands else {})})
    return 0 if all(holds.values()) else 1
