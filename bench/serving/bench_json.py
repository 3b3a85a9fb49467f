"""json: 16 chats, 8 at a time, about 40 tokens in, 96 out at most, free and held to a schema of five fields.

Its figure is the ratio of the time per token, free to held: 1 where a schema costs nothing, more where its
text is forced. Free and held rounds take turns in going first. A model of random weights fills the JSON with
nonsense, so that few objects end within 96 tokens: it is what the mask costs that is measured.

    python bench/serving/bench_json.py [--shape qwen05] [--base-url URL --model NAME] [--rounds 5] [-- FLAGS]
"""

from __future__ import annotations

import asyncio
import random
import statistics
from time import perf_counter

from client import Answer, Client
from workload import SEED, WARM_UP, arguments, served, show

NUM_CHATS, NUM_WORKERS, MAX_TOKENS, NUM_WORDS = 16, 8, 96, 24
WORDS = ("apple", "river", "seven", "paper", "green", "stone", "night", "bread", "small", "horse")
FIELDS = {
    "name": {"type": "string"},
    "age": {"type": "integer"},
    "city": {"type": "string"},
    "score": {"type": "number"},
    "is_member": {"type": "boolean"},
}
SCHEMA = {"type": "object", "properties": FIELDS, "required": list(FIELDS), "additionalProperties": False}
HELD = {
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "person", "schema": SCHEMA, "strict": True},
    },
    "ignore_eos": False,
}


async def chats(client: Client, texts: list[str], fields: dict) -> list[Answer]:
    waiting = iter(texts)

    async def work() -> list[Answer]:
        return [await client.chat(text, MAX_TOKENS, **fields) for text in waiting]

    answers = await asyncio.gather(*(work() for _ in range(NUM_WORKERS)))
    return [answer for some in answers for answer in some]


async def one_round(client: Client, index: int) -> dict[str, float]:
    draw = random.Random(f"{SEED} json {index}")
    texts = [" ".join(draw.choices(WORDS, k=NUM_WORDS)) for _ in range(NUM_CHATS)]
    kinds = [("free", {}), ("held", HELD)]
    figures: dict[str, float] = {}
    for kind, fields in kinds if index % 2 == 0 else kinds[::-1]:
        began_s = perf_counter()
        answers = await chats(client, texts, fields)
        elapsed_s = perf_counter() - began_s
        completions = [answer.read(is_exact=True if kind == "free" else None) for answer in answers]
        num_tokens = sum(c.num_tokens for c in completions)
        figures[f"{kind}_us_per_token"] = elapsed_s / num_tokens * 1e6
        figures[f"{kind}_tokens"] = num_tokens
    figures["prompt_tokens"] = statistics.mean(c.prompt_len for c in completions)
    return {"ratio": figures["free_us_per_token"] / figures["held_us_per_token"], **figures}


async def measure(client: Client, num_rounds: int) -> list[dict[str, float]]:
    try:
        rounds = [await one_round(client, index) for index in range(WARM_UP, num_rounds)]
    finally:
        client.close()
    return rounds[1:]  # behind that of warming up


def main() -> None:
    args = arguments(__doc__)
    with served(args) as (base_url, _):
        rounds = asyncio.run(measure(Client(base_url, args.model, args.api_key, **args.extra), args.rounds))
    show("json", args, rounds)


if __name__ == "__main__":
    main()
