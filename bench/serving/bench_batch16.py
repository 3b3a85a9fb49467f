"""batch16: 16 requests at once, 256 tokens in, none shared, 64 out. Its figure is output_tok_s.

python bench/serving/bench_batch16.py [--shape qwen05] [--base-url URL --model NAME] [-- FLAGS]
"""

from random import Random

from client import Answer, Client
from workload import Workload, at_once, main, prompt


async def run(client: Client, draw: Random) -> list[Answer]:
    return await at_once(client, [prompt(draw, 256) for _ in range(16)], 64, num_workers=16)


WORKLOAD = Workload("batch16", run, figure="output_tok_s")


if __name__ == "__main__":
    main(WORKLOAD, __doc__)
