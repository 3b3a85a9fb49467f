"""http1: 100 requests of 16 tokens in and 16 out, one after another: what the server itself costs.

On the bundled model. Its figures are requests_s and itl_p50_ms.

    python bench/serving/bench_http1.py [--base-url URL --model NAME] [-- FLAGS]
"""

from random import Random

from client import Answer, Client
from workload import Workload, at_once, main, prompt


async def run(client: Client, draw: Random) -> list[Answer]:
    return await at_once(client, [prompt(draw, 16) for _ in range(100)], 16, num_workers=1)


WORKLOAD = Workload("http1", run, figure="requests_s")


if __name__ == "__main__":
    main(WORKLOAD, __doc__)
