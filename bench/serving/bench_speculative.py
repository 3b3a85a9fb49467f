"""speculative: answers with `--speculative ngram` against the same answers without it, on two servers.

echo: greedy answers to prompts that say one passage four times, with a negative frequency penalty, so that
they go on with what was said or fall into a loop, whatever the model.
chat: the bundled model asked to repeat words, as many tokens as these are; left out with --shape.
other: sampled at temperature 1 behind random tokens, where guesses hardly help. Each with one request
at a time and with eight; the ratios of the tokens per second are the figures, and those of the CPU time.
One echo at a time is to be 1.5 times as fast, and other text to lose 3 % at most; the exit status is 1 where
a median says otherwise, which on a busy machine means little.

    python bench/serving/bench_speculative.py [--shape qwen05] [--rounds 7] [-- FLAGS]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from time import perf_counter
from urllib.request import Request, urlopen

from client import BadAnswer, Client
from in_turns import Demand, Rounds, main, wave
from own_server import OwnServer
from workload import SEED, WARM_UP, prompt

WAVES = 2
AT_ONCE = (1, 8)
MAX_TOKENS = {"echo": 128, "chat": 16, "other": 128}
PASSAGE_LEN = 24
SPECULATIVE = {"off": [], "ngram": ["--speculative", "ngram"]}
DEMANDS = (
    Demand("echo1", "ratio", least=1.5),
    Demand("other1", "ratio", least=0.97),
    Demand("other8", "ratio", least=0.97),
)
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
            group = prompts[begin : begin + num_at_once]
            raw += await wave(client, group, [MAX_TOKENS[workload]] * len(group))
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


async def measure(servers: dict[str, OwnServer], args: argparse.Namespace) -> Rounds:
    rounds: Rounds = {}
    workloads = [name for name in PROMPTS if name != "chat" or not args.shape]
    for index in range(WARM_UP, args.rounds):
        for workload in workloads:
            for num_at_once in AT_ONCE:
                figures = await one_round(servers, workload, num_at_once, index)
                if index != WARM_UP:
                    rounds.setdefault(f"{workload}{num_at_once}", []).append(figures)
    return rounds


if __name__ == "__main__":
    sys.exit(main("speculative", __doc__, SPECULATIVE, measure, DEMANDS))
