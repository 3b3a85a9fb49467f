"""shared: 48 requests, 8 at a time, a common prefix of 1,024 tokens and 32 of their own, 32 out.

Its figure is output_tok_s.

    python bench/serving/bench_shared.py [--shape qwen05] [--base-url URL --model NAME] [-- FLAGS]
"""

from random import Random

from client import Answer, Client
from workload import Workload, at_once, main, prompt


async def run(client: Client, draw: Random) -> list[Answer]:
    prefix = prompt(draw, 1024)
    return await at_once(client, [prefix + prompt(draw, 32) for _ in range(48)], 32, num_workers=8)


WORKLOAD = Workload("shared", run, figure="output_tok_s")


if __name__ == "__main__":
    main(WORKLOAD, __doc__)
