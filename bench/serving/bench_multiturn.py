"""multiturn: 8 conversations at once, 4 turns: 256 tokens first, then the answer and 32 new ones; 32 out.

The answer goes back as its own token ids where the server tells them (return_token_ids); else drawn ids
stand in for it, and only the prompts can be found in the cache. Its figure is output_tok_s.

    python bench/serving/bench_multiturn.py [--shape qwen05] [--base-url URL --model NAME] [-- FLAGS]
"""

import asyncio
from random import Random

from client import Answer, Client
from workload import Workload, main, prompt

OUTPUT_LEN = 32


async def run(client: Client, draw: Random) -> list[Answer]:
    openings = [prompt(draw, 256) for _ in range(8)]
    additions = [[prompt(draw, 32) for _ in range(3)] for _ in openings]
    stand_ins = [[prompt(draw, OUTPUT_LEN) for _ in range(3)] for _ in openings]
    conversations = zip(openings, additions, stand_ins, strict=True)
    answers = await asyncio.gather(*(_converse(client, *each) for each in conversations))
    return [answer for some in answers for answer in some]


async def _converse(
    client: Client, context: list[int], additions: list[list[int]], stand_ins: list[list[int]]
) -> list[Answer]:
    answers = [await client.complete(context, OUTPUT_LEN)]
    for addition, stand_in in zip(additions, stand_ins, strict=True):
        told = answers[-1].read().token_ids
        context = context + (told if len(told) == OUTPUT_LEN else stand_in) + addition
        answers.append(await client.complete(context, OUTPUT_LEN))
    return answers


WORKLOAD = Workload("multiturn", run, figure="output_tok_s", fields={"return_token_ids": True})


if __name__ == "__main__":
    main(WORKLOAD, __doc__)
