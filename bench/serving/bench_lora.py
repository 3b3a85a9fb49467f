"""lora: what adapters cost a decode step, all modules and q and v, of eight requests and of one.

    python bench/serving/bench_lora.py [--rounds 9] [-- FLAGS]

Our own server with random weights of the 0.5-billion-parameter shape and random bf16 adapters of rank
16. In each round every workload is decoded without and with adapters, the one or the other first in turns;
its figure is the median over rounds of the extra time of a step (the median gap between two tokens), as a
share of the step without, and against the time to read the adapters' bytes at the read bandwidth that is
measured in every round too. That all adapters were in memory is checked before anything is timed.

What must hold (DEMANDS) is checked; it exits with 1 if something does not. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from client import Client
from harness import machine, report
from limits import Limits
from own_server import OwnServer, shaped_checkpoint
from workload import SEED, prompt

SHAPE = Path(__file__).with_name("qwen05.json")
RANK, NUM_ADAPTERS, TOKENS_IN, TOKENS_OUT = 16, 8, 32, 64
MIN_ROUNDS = 7
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WORKLOADS = {
    "8 adapters, all modules, batch 8": ("all", NUM_ADAPTERS),
    "8 adapters, q and v, batch 8": ("qv", NUM_ADAPTERS),
    "1 adapter, all modules, batch 1": ("all", 1),
}
"""(kind, requests), each with an adapter of its own."""

EIGHT, EIGHT_QV, ONE = WORKLOADS
DEMANDS = (
    (EIGHT, "times_ideal", 1.6),
    (EIGHT, "share", 0.25),
    (EIGHT_QV, "share", 0.08),
    (ONE, "share", 0.08),
)
"""(workload, figure, at most). A share is of the time of a step without adapters, `times_ideal` of the time
to read the adapters once."""


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each linear module of a layer, by its name in the checkpoint."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = config["num_key_value_heads"] * (hidden // config["num_attention_heads"])
    attention = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden)}
    attention["o_proj"] = (hidden, hidden)
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return {f"self_attn.{n}": s for n, s in attention.items()} | {f"mlp.{n}": s for n, s in mlp.items()}


def write_adapter(directory: Path, config: dict[str, Any], targets: tuple[str, ...], seed: int) -> int:
    """Random weights in PEFT's format; how many bytes a step reads of them."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for module, (outputs, inputs) in shapes(config).items():
            if module.split(".")[1] not in targets:
                continue
            for part, shape in (("lora_A", (RANK, inputs)), ("lora_B", (outputs, RANK))):
                name = f"base_model.model.model.layers.{layer}.{module}.{part}.weight"
                weights[name] = (torch.randn(shape, generator=generator) * 0.02).bfloat16()
    directory.mkdir(parents=True)
    save_file(weights, directory / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "target_modules": list(targets)}
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    return sum(weight.nbytes for weight in weights.values())


async def step_ms(base_url: str, adapters: list[str | None], draw: random.Random) -> float:
    """Median time of a decode step that all of these requests share, in milliseconds."""
    clients = [
        Client(base_url, "default", skip_special_tokens=False, **({"lora_path": path} if path else {}))
        for path in adapters
    ]
    answers = await asyncio.gather(*(c.complete(prompt(draw, TOKENS_IN), TOKENS_OUT) for c in clients))
    for client in clients:
        client.close()
    completions = [answer.read() for answer in answers]
    begin, end = max(c.text_s[0] for c in completions), min(c.text_s[-1] for c in completions)
    gaps = [
        late - early
        for c in completions
        for early, late in zip(c.text_s, c.text_s[1:], strict=False)
        if early >= begin and late <= end  # all of them decode
    ]
    return statistics.median(gaps) * 1e3


class Rounds(NamedTuple):
    """What each round measured: (without, with) in milliseconds by workload, and 10^9 bytes a second."""

    pairs: dict[str, list[tuple[float, float]]]
    read_gbps: list[float]


async def measure(
    base_url: str, paths: dict[str, list[str]], num_rounds: int, read_gbps: Callable[[], float]
) -> Rounds:
    """After one round of warming up."""
    draw = random.Random(f"{SEED} lora")
    found = Rounds({name: [] for name in WORKLOADS}, [])
    for index in range(num_rounds + 1):
        if index == 1:
            check_loaded(base_url, sum(map(len, paths.values())))
        gbps = read_gbps()
        for name, (kind, count) in WORKLOADS.items():
            ways: list[list[str | None]] = [[None] * count, [*paths[kind][:count]]]
            first = index % 2
            times = {way: await step_ms(base_url, ways[way], draw) for way in (first, 1 - first)}
            if index:
                found.pairs[name].append((times[0], times[1]))
        if index:
            found.read_gbps.append(gbps)
    return found


def check_loaded(base_url: str, num_adapters: int) -> None:
    with urlopen(f"{base_url}/v1/loads", timeout=10) as answer:
        num_loaded = json.load(answer)["aggregate"]["lora_pool_slots_used"]
    if num_loaded != num_adapters:
        raise SystemExit(f"{num_loaded} of {num_adapters} adapters are in memory")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help=f"at least {MIN_ROUNDS} (default: 9)")
    parser.add_argument("flags", nargs="*", help="flags of the server (default: --num-threads 2)")
    args = parser.parse_args()
    if args.rounds < MIN_ROUNDS:
        parser.error(f"--rounds must be at least {MIN_ROUNDS}")
    flags = args.flags or ["--num-threads", "2"]
    num_threads = int(flags[flags.index("--num-threads") + 1]) if "--num-threads" in flags else 2
    config = json.loads(SHAPE.read_text())
    limits = Limits(num_threads)
    with tempfile.TemporaryDirectory() as folder, shaped_checkpoint(SHAPE) as checkpoint:
        paths: dict[str, list[str]] = {}
        num_bytes: dict[str, int] = {}
        for kind, targets in (("all", ALL), ("qv", ("q_proj", "v_proj"))):
            directories = [Path(folder) / f"{kind}{seed}" for seed in range(NUM_ADAPTERS)]
            sizes = [write_adapter(d, config, targets, seed) for seed, d in enumerate(directories)]
            paths[kind], num_bytes[kind] = list(map(str, directories)), sizes[0]
        own = ["--model-path", str(checkpoint), "--load-format", "dummy", "--lora-dir", folder]
        server = OwnServer([*flags, *own])
        try:
            found = asyncio.run(measure(server.base_url, paths, args.rounds, limits.read_gbps))
        finally:
            server.stop()
    return show(flags, found, num_bytes)


class Figure(NamedTuple):
    """Median and quartiles of the rounds."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Figure:
        return cls(*statistics.quantiles(values, n=4))


def show(flags: list[str], found: Rounds, num_bytes: dict[str, int]) -> int:
    """Print what was found; the exit status: 1 if a demand is missed."""
    gbps = statistics.median(found.read_gbps)
    print(
        f"{machine()}\nread bandwidth {gbps:.1f} GB/s; {len(found.read_gbps)} rounds after one of warming up"
    )
    print("medians over rounds, quartiles in brackets\n")
    results: dict[str, dict[str, Any]] = {}
    for name, (kind, count) in WORKLOADS.items():
        base = Figure.of([without for without, _ in found.pairs[name]])
        extra = Figure.of([with_ - without for without, with_ in found.pairs[name]])
        ideal_ms = num_bytes[kind] * count / gbps / 1e6
        results[name] = {
            "step_ms": base,
            "extra_ms": extra,
            "ideal_ms": ideal_ms,
            "share": extra.median / base.median,
            "times_ideal": extra.median / ideal_ms,
        }
        print(
            f"{name:34} step {base.median:6.2f} ms [{base.low:.2f}, {base.high:.2f}], "
            f"extra {extra.median:5.2f} ms [{extra.low:.2f}, {extra.high:.2f}], "
            f"to read {num_bytes[kind] * count / 1e6:.0f} MB {ideal_ms:.2f} ms"
        )
    print()
    demands = []
    for name, figure, most in DEMANDS:
        value = results[name][figure]
        demands.append(
            {"workload": name, "figure": figure, "value": value, "most": most, "holds": value <= most}
        )
        print(f"{'pass' if value <= most else 'FAIL'}  {name}: {figure} {value:.3f}, at most {most}")
    print()
    report("serving_lora", {
        "flags": flags, "read_gbps": found.read_gbps, "workloads": results, "demands": demands,
        "rounds_ms": found.pairs,
    })  # fmt: skip
    return 0 if all(demand["holds"] for demand in demands) else 1


if __name__ == "__main__":
    sys.exit(main())
