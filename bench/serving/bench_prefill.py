"""prefill: four prompts of 1,024 tokens, one after another, 1 out. Its figure is prefill_tok_s.

python bench/serving/bench_prefill.py [--shape qwen05] [--base-url URL --model NAME] [-- FLAGS]
"""

from random import Random

from client import Answer, Client
from workload import Workload, main, prompt


async def run(client: Client, draw: Random) -> list[Answer]:
    return [await client.complete(prompt(draw, 1024), 1) for _ in range(4)]


WORKLOAD = Workload("prefill", run, figure="prefill_tok_s")


if __name__ == "__main__":
    main(WORKLOAD, __doc__)
