"""http: 400 requests of 16 tokens in and 16 out, 32 at a time: what the server itself costs.

On the bundled model. Its figures are requests_s and, of our server, own_cpu_us_per_token: CPU time of both
processes, from getrusage, less that of the forward's native code. That is what runs in parallel regions:
the pool's threads, which compute, or spin for up to 200 µs behind a region, and the engine's thread inside
of regions. All Python counts, that of the runner between two kernels included; the client does not.

    python bench/serving/bench_http.py [--base-url URL --model NAME] [-- FLAGS]
"""

from random import Random

from client import Answer, Client
from workload import Workload, at_once, main, prompt


async def run(client: Client, draw: Random) -> list[Answer]:
    return await at_once(client, [prompt(draw, 16) for _ in range(400)], 16, num_workers=32)


WORKLOAD = Workload("http", run, figure="requests_s")


if __name__ == "__main__":
    main(WORKLOAD, __doc__)
