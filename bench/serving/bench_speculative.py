"""speculative: answers with `--speculative ngram` against the same answers without it, on two servers.

echo: greedy answers to prompts that say one passage four times, with a negative frequency penalty, so that
they go on with what was said or fall into a loop, whatever the model.
chat: the bundled model asked to repeat words, as many tokens as these are; left out with --shape.
other: sampled at temperature 1 behind random tokens, where guesses hardly help. Each with one request
at a time and with eight; the ratios of the tokens per second are the figures, and those of the CPU time.

    python bench/serving/bench_speculative.py [--shape qwen05] [--rounds 7] [-- FLAGS]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from urllib.request import Request, urlopen

from client import BadAnswer, Client
from own_server import OwnServer, shaped_checkpoint
from workload import SEED, WARM_UP, machine, prompt, report

WAVES = 2
AT_ONCE = (1, 8)
MAX_TOKENS = {"echo": 128, "chat": 16, "other": 128}
PASSAGE_LEN = 24
SPECULATIVE = {"off": [], "ngram": ["--speculative", "ngram"]}
COMMON = {"skip_special_tokens": False, "return_token_ids": True}
WORDS = ("apple", "river", "seven", "paper", "green", "stone", "night", "bread", "small", "horse")


def echo(draw: random.Random, _: OwnServer) -> list[int]:
    return 4 * prompt(draw, PASSAGE_LEN)


def chat(draw: random.Random, server: OwnServer) -> list[int]:
    words = " ".join(draw.choices(WORDS, k=12))
    text = f"<|im_start|>user\nRepeat after me: {words}<|im_end|>\n<|im_start|>assistant\n"
    return _post(server, "/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]


def other(draw: random.Random, _: OwnServer) -> list[int]:
    return prompt(draw, 64)


PROMPTS: dict[str, Callable[[random.Random, OwnServer], list[int]]] = {
    "echo": echo,
    "chat": chat,
    "other": other,
}
FIELDS = {"echo": {"frequency_penalty": -2}, "chat": {}, "other": {"temperature": 1, "seed": 1}}


def _post(server: OwnServer, path: str, body: dict) -> dict:
    headers = {"Content-Type": "application/json"}
    with urlopen(Request(server.base_url + path, json.dumps(body).encode(), headers)) as answer:
        return json.load(answer)


def _guesses(server: OwnServer) -> tuple[int, int]:
    """(computed, right) so far."""
    with urlopen(f"{server.base_url}/v1/loads") as answer:
        load = json.load(answer)["aggregate"]
    return load["spec_num_draft_tokens"], load["spec_num_accepted_tokens"]


async def one_round(
    servers: dict[str, OwnServer], workload: str, num_at_once: int, index: int
) -> dict[str, float]:
    """Tokens per second of both servers, which take turns in going first, and what came of guesses."""
    draw = random.Random(f"{SEED} {workload} {index}")
    prompts = [PROMPTS[workload](draw, servers["off"]) for _ in range(WAVES * num_at_once)]
    figures, answers = {}, {}
    before = _guesses(servers["ngram"])
    for name in sorted(servers, reverse=index % 2 == 0):
        client = Client(servers[name].base_url, "default", **COMMON, **FIELDS[workload])
        cpu_before, began_s = servers[name].cpu_time(), perf_counter()
        raw = []
        for begin in range(0, len(prompts), num_at_once):
            wave = prompts[begin : begin + num_at_once]
            raw += await asyncio.gather(*(client.complete(ids, MAX_TOKENS[workload]) for ids in wave))
        elapsed_s = perf_counter() - began_s
        cpu = servers[name].cpu_time() - cpu_before
        client.close()
        completions = [answer.read() for answer in raw]
        answers[name] = [completion.token_ids for completion in completions]
        num_tokens = sum(c.num_tokens for c in completions)
        figures[f"{name}_tok_s"] = num_tokens / elapsed_s
        figures[f"{name}_engine_cpu_us_per_token"] = cpu.engine_s / num_tokens * 1e6
    if answers["off"] != answers["ngram"]:
        raise BadAnswer("the answers differ")
    computed, right = (now - then for now, then in zip(_guesses(servers["ngram"]), before, strict=True))
    return {
        "ratio": figures["ngram_tok_s"] / figures["off_tok_s"],
        "cpu_ratio": figures["off_engine_cpu_us_per_token"] / figures["ngram_engine_cpu_us_per_token"],
        **figures,
        "drafts_per_token": computed / num_tokens,
        "accepted_per_token": right / num_tokens,
    }


async def measure(
    servers: dict[str, OwnServer], workloads: list[str], num_rounds: int
) -> dict[str, list[dict[str, float]]]:
    rounds: dict[str, list[dict[str, float]]] = {}
    for index in range(WARM_UP, num_rounds):
        for workload in workloads:
            for num_at_once in AT_ONCE:
                figures = await one_round(servers, workload, num_at_once, index)
                if index != WARM_UP:
                    rounds.setdefault(f"{workload}{num_at_once}", []).append(figures)
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", help="serve random weights of this shape (qwen05: qwen05.json here)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("flags", nargs="*", help="flags of the servers (default: --num-threads 2)")
    args = parser.parse_args()
    workloads = [name for name in PROMPTS if name != "chat" or not args.shape]
    with contextlib.ExitStack() as stack:
        flags = args.flags or ["--num-threads", "2"]
        if args.shape:
            shape = Path(__file__).with_name(f"{args.shape}.json")
            directory = stack.enter_context(shaped_checkpoint(shape))
            flags = [*flags, "--model-path", str(directory), "--load-format", "dummy"]
        servers = {name: OwnServer([*flags, *more]) for name, more in SPECULATIVE.items()}
        try:
            rounds = asyncio.run(measure(servers, workloads, args.rounds))
        finally:
            for server in servers.values():
                server.stop()
    results = {}
    print(f"{machine()}\nspeculative, {args.rounds} rounds after one of warming up\n")
    print(f"{'':36}    median    lowest   highest")
    for name, figures in rounds.items():
        for figure in figures[0]:
            samples = [one[figure] for one in figures]
            results[f"{name}_{figure}"] = statistics.median(samples)
            shown = f"{statistics.median(samples):10.3f}{min(samples):10.3f}{max(samples):10.3f}"
            print(f"{name + ' ' + figure:36}{shown}")
    print()
    report(
        "serving_speculative", {"shape": args.shape, "flags": args.flags, "rounds": args.rounds, **results}
    )


if __name__ == "__main__":
    main()
