"""structured: 8 requests at once whose answers follow a JSON schema, against the same without one.

Each wave of constrained answers is followed, or preceded, by free ones with the same prompts and as many
tokens each. Its figures are the ratios of the time per output token, constrained to free, with forced text
computed at once (at most 1.0) and, on a second server, token by token (at most 1.05); where a median is
above its limit the exit status is 1. The ratios of CPU time, of all processes of the server, say the same
where other programs make the clock's times noisy.

    python bench/serving/bench_structured.py [--shape qwen05] [--rounds 7] [-- FLAGS]
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
from collections.abc import Iterator
from time import perf_counter

from client import BadAnswer, Client, Completion
from in_turns import Demand, Rounds, main, wave
from own_server import CpuTime, OwnServer
from workload import SEED, WARM_UP, prompt

NUM_AT_ONCE = 8
WAVES = 3
PROMPT_LEN = 64
MAX_TOKENS = 512
TEXT = {"type": "string", "minLength": 10, "maxLength": 60}
SCHEMA = {
    "type": "object",
    "properties": {
        "first_name": {"type": "string", "maxLength": 20},
        "last_name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "occupation": {"enum": ["engineer", "teacher", "physician", "carpenter", "student"]},
        "address": {
            "type": "object",
            "properties": {"street": TEXT, "city": {"type": "string", "maxLength": 30}},
            "required": ["street", "city"],
        },
        "remarks": {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 2},
    },
    "required": ["first_name", "last_name", "age", "occupation", "address", "remarks"],
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}


SERVERS = {"at_once": [], "one_by_one": ["--disable-jump-forward"]}
DEMANDS = (Demand("at_once", "ratio", 1.0), Demand("one_by_one", "ratio", 1.05))


async def completed(
    client: Client, prompts: list[list[int]], limits: list[int], *, is_free: bool
) -> list[Completion]:
    return [answer.read(is_exact=is_free) for answer in await wave(client, prompts, limits)]


class _Spent:
    """Seconds of one kind of answers: by the clock, and of CPU time by process."""

    def __init__(self, server: OwnServer) -> None:
        self.clock_s, self.cpu = 0.0, CpuTime(0.0, 0.0, 0.0)
        self._server = server

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        began_s, before = perf_counter(), self._server.cpu_time()
        yield
        self.clock_s += perf_counter() - began_s
        spent = self._server.cpu_time() - before
        self.cpu += spent

    def us_per_token(self, num_tokens: int) -> dict[str, float]:
        times_s = {"": self.clock_s, "http_cpu_": self.cpu.server_s, "engine_cpu_": self.cpu.engine_s}
        return {f"{name}us_per_token": time_s / num_tokens * 1e6 for name, time_s in times_s.items()}


async def one_round(
    server: OwnServer, constrained: Client, free: Client, draw: random.Random, free_first: bool
) -> dict[str, float]:
    """Times of constrained and of free answers, per output token, and the share of forced ones."""
    prompts = [[prompt(draw, PROMPT_LEN) for _ in range(NUM_AT_ONCE)] for _ in range(WAVES)]
    most = [MAX_TOKENS] * NUM_AT_ONCE
    counts = [
        [c.num_tokens for c in await completed(constrained, group, most, is_free=False)] for group in prompts
    ]
    spent = {"constrained": _Spent(server), "free": _Spent(server)}
    num_forced = num_tokens = 0
    for group, limits in zip(prompts, counts, strict=True):
        for kind in ("free", "constrained") if free_first else ("constrained", "free"):
            client = constrained if kind == "constrained" else free
            limits_of_kind = most if kind == "constrained" else limits
            with spent[kind].measured():
                completions = await completed(client, group, limits_of_kind, is_free=kind == "free")
            if kind == "constrained":
                if [c.num_tokens for c in completions] != limits:
                    raise BadAnswer("the same requests gave answers of other lengths")
                num_tokens += sum(limits)
                num_forced += sum(len(ids) - 1 for c in completions for ids in c.token_ids_of_events)
    cpu_s = {kind: one.cpu.server_s + one.cpu.engine_s for kind, one in spent.items()}
    return {
        "ratio": spent["constrained"].clock_s / spent["free"].clock_s,
        "cpu_ratio": cpu_s["constrained"] / cpu_s["free"],
        **{
            f"{kind}_{name}": figure
            for kind, one in spent.items()
            for name, figure in one.us_per_token(num_tokens).items()
        },
        "forced_share": num_forced / num_tokens,
    }


async def measure(servers: dict[str, OwnServer], args: argparse.Namespace) -> Rounds:
    rounds: Rounds = {name: [] for name in servers}
    clients = {}
    common = {"skip_special_tokens": False, "return_token_ids": True, "temperature": 1}
    for name, server in servers.items():
        constrained = Client(
            server.base_url, "default", response_format=FORMAT, seed=1, ignore_eos=False, **common
        )
        clients[name] = constrained, Client(server.base_url, "default", seed=1, **common)
    for index in range(WARM_UP, args.rounds):
        for name, (constrained, free) in clients.items():
            draw = random.Random(f"{SEED} structured {index}")
            figures = await one_round(servers[name], constrained, free, draw, free_first=index % 2 == 0)
            if index != WARM_UP:
                rounds[name].append(figures)
    for pair in clients.values():
        for client in pair:
            client.close()
    return rounds


if __name__ == "__main__":
    sys.exit(main("structured", __doc__, SERVERS, measure, DEMANDS))
