"""lora: what adapters cost a decode step, all modules and q and v, of eight requests and of one.

    python bench/serving/bench_lora.py [--rounds 7] [-- FLAGS]

Our own server with random weights of the 0.5-billion-parameter shape and random bf16 adapters of rank
16. In each round every workload is decoded once without and once with adapters, in turns; its figure
is the median over rounds of the extra time of a step (the median gap between two tokens), as a share of the
step without, and against the time to read the adapters' bytes at the read bandwidth that is measured in
the same run. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from client import Client
from harness import machine, report
from limits import Limits
from workload import SEED, prompt

from server import OwnServer, shaped_checkpoint

SHAPE = Path(__file__).with_name("qwen05.json")
RANK, NUM_ADAPTERS, TOKENS_IN, TOKENS_OUT = 16, 8, 32, 64
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WORKLOADS = {
    "8 adapters, all modules, batch 8": ("all", NUM_ADAPTERS),
    "8 adapters, q and v, batch 8": ("qv", NUM_ADAPTERS),
    "1 adapter, all modules, batch 1": ("all", 1),
}
"""(kind, requests), each with an adapter of its own."""


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


async def measure(base_url: str, paths: dict[str, list[str]], num_rounds: int) -> dict[str, list]:
    """(without, with) in milliseconds, by workload, for each round after one of warming up."""
    draw = random.Random(f"{SEED} lora")
    found: dict[str, list] = {name: [] for name in WORKLOADS}
    for index in range(num_rounds + 1):
        for name, (kind, count) in WORKLOADS.items():
            pair = [await step_ms(base_url, paths_, draw) for paths_ in ([None] * count, paths[kind][:count])]
            if index:
                found[name].append(pair)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("flags", nargs="*", help="flags of the server (default: --num-threads 2)")
    args = parser.parse_args()
    flags = args.flags or ["--num-threads", "2"]
    num_threads = int(flags[flags.index("--num-threads") + 1]) if "--num-threads" in flags else 2
    config = json.loads(SHAPE.read_text())
    read_gbps = Limits(num_threads).read_gbps()
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
            found = asyncio.run(measure(server.base_url, paths, args.rounds))
        finally:
            server.stop()
    show(args, found, num_bytes, read_gbps)


def show(args: argparse.Namespace, found: dict[str, list], num_bytes: dict[str, int], gbps: float) -> None:
    print(f"{machine()}\nread bandwidth {gbps:.1f} GB/s; {args.rounds} rounds after one of warming up\n")
    results = []
    for name, (kind, count) in WORKLOADS.items():
        base_ms = statistics.median(without for without, _ in found[name])
        extras = [with_ - without for without, with_ in found[name]]
        extra_ms, ideal_ms = statistics.median(extras), num_bytes[kind] * count / gbps / 1e6
        print(
            f"{name:34} step {base_ms:7.2f} ms, extra {extra_ms:6.2f} ms "
            f"({min(extras):.2f} to {max(extras):.2f}) = {extra_ms / base_ms:5.1%}, "
            f"{extra_ms / ideal_ms:.2f} x the time to read {num_bytes[kind] * count / 1e6:.0f} MB"
        )
        results.append({
            "name": name, "step_ms": base_ms, "extra_ms": extra_ms, "share": extra_ms / base_ms,
            "times_ideal": extra_ms / ideal_ms, "bytes": num_bytes[kind] * count,
        })  # fmt: skip
    print()
    report(
        "serving_lora", {"flags": args.flags, "rounds": args.rounds, "read_gbps": gbps, "workloads": results}
    )


if __name__ == "__main__":
    main()
