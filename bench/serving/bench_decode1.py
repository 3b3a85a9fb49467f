"""decode1: one stream, 128 tokens in, 128 out. Its figure is decode_tok_s.

python bench/serving/bench_decode1.py [--shape qwen05] [--base-url URL --model NAME] [-- FLAGS]
"""

from random import Random

from client import Answer, Client
from workload import Workload, main, prompt


async def run(client: Client, draw: Random) -> list[Answer]:
    return [await client.complete(prompt(draw, 128), 128)]


WORKLOAD = Workload("decode1", run, figure="decode_tok_s")


if __name__ == "__main__":
    main(WORKLOAD, __doc__)
