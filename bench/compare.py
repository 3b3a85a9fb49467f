"""Our engine against rivals, on one machine with the same weights, in turns: the ratios that a claim quotes.

    python bench/compare.py CASE --weights WEIGHTS --rival NAME[=PROGRAM] [--rounds 3]

CASE is one of `CASES`: a format, or http. WEIGHTS is what bench/serving/make_weights.py wrote. NAME is vllm,
llama.cpp, openvino or transformers (give --rival again for more), PROGRAM its executable, or the Python that
has its packages; bench/README.md says how each is installed. Every engine is started once and stopped
(SIGSTOP) while another is measured. A round asks each workload of all engines, one after the other, another
one first each time; all get the same prompts. What the machine can read and multiply is measured before and
after, and each workload compared with that.
Ends with 1 where a demand is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import importlib
import os
import random
import signal
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "serving"))
from attainable import Attainable, Rates
from client import Client
from engines import ADAPTERS, OWN, RunningEngine, Setting, free_port
from harness import machine, report
from workload import Workload, at_once, measure_round, prompt

from engine.models.registry import read_spec

Samples = Mapping[str, Mapping[str, Sequence[float]]]
"""By workload, by engine: its figure in each round."""


@dataclasses.dataclass(frozen=True)
class Demand:
    """Our median is to be at least `least` times that of the best of `over`; of all rivals, if None."""

    workload: str
    least: float
    over: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """`own_format`: that of our engine, where it is not the one that the rivals are asked for."""

    model: str
    format: str
    demands: tuple[Demand, ...]
    own_format: str | None = None

    def format_of(self, engine: str) -> str:
        return self.own_format or self.format if engine == OWN else self.format

    @property
    def is_bound_by_the_model(self) -> bool:
        """Otherwise weights stay in the caches, and what is measured is the server."""
        return self.model != "tiny"

    def workloads(self) -> list[str]:
        return list(dict.fromkeys(demand.workload for demand in self.demands))


def _demands(over: tuple[str, ...], **least: float) -> tuple[Demand, ...]:
    return tuple(Demand(workload, ratio, over) for workload, ratio in least.items())


_FAST = ("openvino", "vllm", "llama.cpp")
"""Whom a claim is about. Nothing is claimed over what is slower than these."""
_BF16_DEMANDS = _demands(_FAST, decode1=1.1, prefill=1.6, batch16=1.6, shared=1.7, multiturn=1.5)
_HTTP_DEMANDS = (
    Demand("http", 3, ("vllm",)),
    Demand("http", 2, ("llama.cpp",)),
    Demand("http1", 1, ("llama.cpp",)),
)
CASES = {
    "bf16": Case("qwen05", "bf16", _BF16_DEMANDS),
    # Activations rounded to bfloat16, which is what most rivals do with such weights.
    "bf16_dot": Case("qwen05", "bf16", _BF16_DEMANDS, own_format="bf16_dot"),
    "int8": Case(
        "qwen05", "int8", _demands(_FAST, decode1=1.1, prefill=1.5, batch16=1.6, shared=1.8, multiturn=1.6)
    ),
    "int4": Case("qwen05", "int4", _demands(_FAST, decode1=1.4, prefill=1.8, batch16=1.5)),
    "http": Case("tiny", "bf16", _HTTP_DEMANDS),
    "http_bf16_dot": Case("tiny", "bf16", _HTTP_DEMANDS, own_format="bf16_dot"),
}


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Ours over that of the rival with the highest median: of medians, and of the single rounds."""

    rival: str
    value: float
    rounds: list[float]

    @classmethod
    def of(cls, figures: Mapping[str, Sequence[float]], over: tuple[str, ...] | None) -> Ratio | None:
        """None where none of `over` was measured."""
        medians = {name: statistics.median(samples) for name, samples in figures.items()}
        rivals = [name for name in medians if name != OWN and (over is None or name in over)]
        if not rivals:
            return None
        best = max(rivals, key=medians.__getitem__)
        rounds = [ours / theirs for ours, theirs in zip(figures[OWN], figures[best], strict=True)]
        return cls(best, medians[OWN] / medians[best], rounds)


def load_workload(name: str) -> Workload:
    return importlib.import_module(f"bench_{name}").WORKLOAD


@contextlib.contextmanager
def started(
    programs: Mapping[str, str], case: Case, args: argparse.Namespace
) -> Iterator[dict[str, RunningEngine]]:
    """All engines, started one at a time and stopped. `programs`: by engine, ours first."""
    engines: dict[str, RunningEngine] = {}
    with contextlib.ExitStack() as stack:
        for name, program in programs.items():
            adapter = ADAPTERS[name]
            stored, program = case.format_of(name), program or adapter.program
            setting = Setting(program, args.weights, case.model, stored, free_port(), args.threads)
            engines[name] = RunningEngine(adapter, setting)
            stack.callback(engines[name].end)
            engines[name].stop()
        yield engines


async def warm_up(client: Client) -> None:
    """A long prompt, and short ones together: what an engine makes at its first step is not timed."""
    draw = random.Random("warm up")
    for answer in [
        await client.complete(prompt(draw, 1024), 4),
        *await at_once(client, [prompt(draw, 16)] * 16, 8, 16),
    ]:
        answer.read()


async def measure_engine(engine: RunningEngine, model: str, workload: Workload, index: int) -> float:
    """The workload's figure in one round, with the engine running only meanwhile."""
    client = Client(engine.base_url, model, **workload.request_fields())
    engine.resume()
    try:
        if index == 0:
            await warm_up(client)
        return (await measure_round(client, workload, index))[workload.figure]
    finally:
        client.close()
        engine.stop()


def measure(engines: Mapping[str, RunningEngine], case: Case, num_rounds: int) -> Samples:
    names = list(engines)
    samples: dict[str, dict[str, list[float]]] = {
        workload: {name: [] for name in names} for workload in case.workloads()
    }
    for index in range(num_rounds):
        first = index % len(names)
        for workload, figures in samples.items():
            for name in names[first:] + names[:first]:
                figure = asyncio.run(
                    measure_engine(engines[name], case.model, load_workload(workload), index)
                )
                figures[name].append(figure)
                print(f"round {index + 1}  {workload:10} {name:14}{figure:10.2f}", flush=True)
    return samples


def show(samples: Samples, demands: Sequence[Demand]) -> list[dict[str, Any]]:
    """Print the table; what became of each demand. `holds` is None where its rivals were not measured."""
    print(f"\n{'workload':10} {'engine':14}{'median':>10}{'lowest':>10}{'highest':>10}{'ours / it':>11}")
    for workload, figures in samples.items():
        ours = statistics.median(figures[OWN])
        for name, values in figures.items():
            median = statistics.median(values)
            ratio = "" if name == OWN else f"{ours / median:11.2f}"
            print(f"{workload:10} {name:14}{median:10.2f}{min(values):10.2f}{max(values):10.2f}{ratio}")
    print()
    judged = []
    for demand in demands:
        ratio = Ratio.of(samples[demand.workload], demand.over)
        holds = None if ratio is None else ratio.value >= demand.least
        judged.append(
            {**dataclasses.asdict(demand), "ratio": ratio and dataclasses.asdict(ratio), "holds": holds}
        )
        found = (
            f"{ratio.value:.2f} times {ratio.rival} ({min(ratio.rounds):.2f} to {max(ratio.rounds):.2f})"
            if ratio
            else (f"{', '.join(demand.over or ('no rival',))} not measured")
        )
        word = {True: "pass", False: "FAIL", None: "open"}[holds]
        print(f"{word}  {demand.workload}: {found}, at least {demand.least:.2f}")
    print()
    return judged


def show_limits(samples: Samples, case: Case, rates: Rates, weights: Path) -> dict[str, Any]:
    """Print how far each workload is from what the machine allows, and with it any engine."""
    units = ", ".join(f"{name} {rate / 1e9:.0f} Gop/s" for name, rate in rates.units.items())
    print(f"limits: reading {rates.read / 1e9:.1f} GB/s, {units}")
    found = {"read_gbps": rates.read / 1e9, "units_gops": {n: r / 1e9 for n, r in rates.units.items()}}
    spec = read_spec(weights / case.model)
    for name, figures in samples.items():
        medians = {engine: statistics.median(values) for engine, values in figures.items()}
        ours = medians.pop(OWN)
        best = max(medians.items(), key=lambda pair: pair[1], default=None)
        attainable = Attainable.of(load_workload(name), spec, case.format_of(OWN), rates)
        print(f"{name:10} {attainable.describe(ours, best)}")
        found[name] = dataclasses.asdict(attainable)
    print()
    return found


def rival(text: str) -> tuple[str, str]:
    """NAME or NAME=PROGRAM. Raises: `ArgumentTypeError`."""
    name, _, program = text.partition("=")
    if name not in ADAPTERS or name == OWN:
        raise argparse.ArgumentTypeError(
            f"no rival {name!r}; there are {', '.join(n for n in ADAPTERS if n != OWN)}"
        )
    return name, program


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--rival", type=rival, action="append", required=True, metavar="NAME[=PROGRAM]")
    parser.add_argument("--workload", action="append", help="only this one; give it again for more")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args()
    case = CASES[args.case]
    if args.workload:
        case = dataclasses.replace(
            case, demands=tuple(d for d in case.demands if d.workload in args.workload)
        )
    if args.rounds < 1 or not case.demands:
        parser.error("nothing to measure")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # ends the engines, too
    print(f"{machine()}\n{args.case}, {args.rounds} rounds, {args.threads} threads\n")
    with started({OWN: "", **dict(args.rival)}, case, args) as engines:
        before = Rates.measured(args.threads) if case.is_bound_by_the_model else None
        samples = measure(engines, case, args.rounds)
        rates = before and before.best(Rates.measured(args.threads))
        facts = {
            name: {"ready_s": one.ready_s, "memory_mb": one.memory_mb()} for name, one in engines.items()
        }
    judged = show(samples, case.demands)
    limits = show_limits(samples, case, rates, args.weights) if rates else {}
    for name, fact in facts.items():
        print(f"{name:14} ready after {fact['ready_s']:.1f} s, {fact['memory_mb']:.0f} MB at the end")
    print()
    report("compare", {"case": args.case, "rounds": args.rounds, "threads": args.threads, "samples": samples,
                       "demands": judged, "limits": limits, "engines": facts})  # fmt: skip
    return 1 if any(one["holds"] is False for one in judged) else 0


if __name__ == "__main__":
    sys.exit(main())
