"""streams64: 64 requests at once, 1,024 tokens in, none shared, 256 out. Its figure is output_tok_s.

python bench/serving/bench_streams64.py [--shape llama8b] [--base-url URL --model NAME] [-- FLAGS]
"""

from random import Random

from client import Answer, Client
from workload import Workload, at_once, main, prompt


async def run(client: Client, draw: Random) -> list[Answer]:
    return await at_once(client, [prompt(draw, 1024) for _ in range(64)], 256, num_workers=64)


WORKLOAD = Workload("streams64", run, figure="output_tok_s")


if __name__ == "__main__":
    main(WORKLOAD, __doc__)
