"""Cost of the radix tree through its binding, at 100,000 and at 1,000,000 blocks.

    python bench/kernels/bench_radix_tree.py

Shapes of the tree, all with prompts of 4,096 tokens and blocks of 16:
- one: each prompt is one node.
- chain: each prompt is a path of 128 nodes; short: of 256 nodes, one block each.
- wide: every block is a node of its own, all of them children of one root.
"repeated" matches the same prompt again and again; "random" another one of 390 each time, which are
all that the smaller tree holds; "cold" another one of all, which in the larger tree are 3,906, more
than the CPU's caches hold.

The limit is what memcmp takes for the tokens of a prompt, warm; the same, cold, is printed beside it.
Ends with status 1 where a match or an eviction takes longer than its bound, or grows more with the tree.
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import thread_time_ns
from typing import Any

import numpy as np

from engine._native import BlockAllocator, RadixTree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import Timing, exit_status, machine, report, time_calls, time_each

BLOCK_SIZE = 16
PROMPT_LEN = 4096
PROMPT_BLOCKS = PROMPT_LEN // BLOCK_SIZE
SIZES = (100_000, 1_000_000)
NODES = {"one": 1, "chain": 128, "short": 256}
MOST_US = {"match one": 10.0, "match chain": 30.0, "evict": 2.0}
MOST_GROWTH = 1.5
"""From 100,000 to 1,000,000 blocks. Not asked of cold matches: the smaller tree lives in the CPU's
caches and the larger one does not, which memcmp alone shows as well."""
WARM_BLOCKS = SIZES[0]
"""Random matches stay within so many blocks, so that both trees ask as much of the caches."""


class Tree:
    """A tree that holds `num_blocks` blocks: prompts of 4,096 tokens, each a path of `num_nodes` nodes."""

    def __init__(self, num_blocks: int, num_nodes: int) -> None:
        self.rng = np.random.default_rng(num_blocks)
        self.allocator = BlockAllocator(num_blocks)
        self.tree = RadixTree(self.allocator, BLOCK_SIZE)
        num_prompts = num_blocks // PROMPT_BLOCKS
        self.prompts = self.rng.integers(0, 150_000, (num_prompts, PROMPT_LEN), np.int32)
        self.block_ids = [self.insert(prompt, PROMPT_BLOCKS // num_nodes) for prompt in self.prompts]

    def insert(self, prompt: np.ndarray, step: int) -> np.ndarray:
        """A locked leaf does not grow, so every insertion under a lock is a node of its own."""
        block_ids = self.allocator.try_allocate(PROMPT_BLOCKS)
        locked = []
        for end in range(step, PROMPT_BLOCKS + 1, step):
            node, _, _ = self.tree.insert("", prompt[: end * BLOCK_SIZE], block_ids[:end])
            self.tree.lock(node)
            locked.append(node)
        for node in locked:
            self.tree.unlock(node)
        self.allocator.release(block_ids)
        return block_ids

    def verify(self, num_nodes: int) -> None:
        assert self.tree.num_nodes == num_nodes * len(self.prompts)
        for i in self.rng.integers(0, len(self.prompts), 50):
            num_tokens, block_ids, _ = self.tree.match("", self.prompts[i])
            assert num_tokens == PROMPT_LEN and np.array_equal(block_ids, self.block_ids[i])


def time_matches(shape: str, size: int) -> Iterator[tuple[str, Timing]]:
    built = Tree(size, NODES[shape])
    built.verify(NODES[shape])
    tree, prompt = built.tree, built.prompts[0].copy()

    def match() -> None:
        tree.match("", prompt)

    def use() -> None:
        node = tree.match("", prompt)[2]
        tree.lock(node)
        tree.unlock(node)

    def match_another(num_prompts: int) -> Timing:
        order = built.rng.integers(0, num_prompts, 3000)

        def another(i: int) -> None:
            prompt[:] = built.prompts[order[i]]

        return time_each(another, lambda _: match(), calls=len(order))

    yield f"match {shape} repeated", time_calls(match, calls=200, clock=thread_time_ns)
    yield f"match {shape} random", match_another(WARM_BLOCKS // PROMPT_BLOCKS)
    yield f"match {shape} cold", match_another(len(built.prompts))
    yield (
        f"match_length {shape} repeated",
        time_calls(lambda: tree.match_length("", prompt), calls=200, clock=thread_time_ns),
    )
    yield f"match, lock, unlock {shape} repeated", time_calls(use, calls=200, clock=thread_time_ns)
    num_cached = tree.num_cached_blocks
    yield f"evict {shape}", time_calls(lambda: tree.evict(1), calls=500, clock=thread_time_ns)
    assert tree.num_cached_blocks == num_cached - 33 * 500
    tree.check()


def time_wide(size: int) -> Iterator[tuple[str, Timing]]:
    """The most nodes and the widest fan-out there can be; each eviction is made good."""
    allocator = BlockAllocator(size)
    tree = RadixTree(allocator, BLOCK_SIZE)
    keys = np.zeros((size, BLOCK_SIZE), np.int32)
    keys[:, 0] = np.random.default_rng(1).permutation(size)
    block_ids = allocator.try_allocate(size)
    for i in range(size):
        tree.insert("", keys[i], block_ids[i : i + 1])
    allocator.release(block_ids)
    assert tree.num_nodes == size

    def insert_again(i: int) -> None:
        if i:
            fresh = allocator.try_allocate(1)
            tree.insert("", keys[i - 1], fresh)
            allocator.release(fresh)

    def evict(_: object) -> None:
        assert tree.evict(1) == 1

    yield "evict wide", time_each(insert_again, evict, calls=3000)
    assert tree.match_length("", keys[2999]) == 0
    for name, most in (("random", WARM_BLOCKS), ("cold", size)):
        order = np.random.default_rng(2).integers(3000, most, 3000)
        yield (
            f"match wide {name}",
            time_each(lambda i, order=order: keys[order[i]], lambda key: tree.match("", key), calls=3000),
        )
    tree.check()


def time_limit(num_prompts: int) -> Timing:
    """memcmp of a prompt with another of `num_prompts`, each time another one."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 150_000, PROMPT_LEN, np.int32).tobytes()
    others = [bytes(bytearray(prompt)) for _ in range(num_prompts)]
    order = rng.integers(0, num_prompts, 3000)
    return time_each(lambda i: others[order[i]], lambda other: prompt == other, calls=len(order))


def judge(name: str, timings: dict[int, list[Timing]]) -> dict[str, Any]:
    """Medians over the rounds. The growth is taken within a round: where memory lies, and what else the
    machine does, differs from round to round, but little within one."""
    rounds = [[timing.median_us for timing in timings[size]] for size in SIZES]
    medians = [median(us) for us in rounds]
    growths = sorted(large / small for small, large in zip(*rounds, strict=True))
    growth = median(growths)
    result: dict[str, Any] = {
        "us": [round(us, 2) for us in medians],
        "us_range": [[round(min(us), 2), round(max(us), 2)] for us in rounds],
        "growth": round(growth, 2),
        "growth_range": [round(growths[0], 2), round(growths[-1], 2)],
    }
    most_us = next((us for key, us in MOST_US.items() if name.startswith(key + " ")), None)
    if most_us is not None:
        grows_little = growth <= MOST_GROWTH or name.endswith("cold")
        result |= {"most_us": most_us, "reached": max(medians) <= most_us and grows_little}
    return result


def bytes_per_block(size: int, blocks_per_insert: int) -> float:
    """Resident memory that the allocator and the tree take for each block that they hold."""
    prompts = np.random.default_rng(3).integers(0, 150_000, (size, BLOCK_SIZE), np.int32)
    before = resident_bytes()
    allocator = BlockAllocator(size)
    tree = RadixTree(allocator, BLOCK_SIZE)
    for begin in range(0, size, blocks_per_insert):
        token_ids = prompts[begin : begin + blocks_per_insert].reshape(-1)
        tree.insert("", token_ids, allocator.try_allocate(len(token_ids) // BLOCK_SIZE))
    assert tree.num_cached_blocks == size
    return (resident_bytes() - before) / size


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=5, help="of new trees of both sizes (default: %(default)s)"
    )
    args = parser.parse_args()
    print(machine())
    limit = time_limit(1)
    print(f"{'memcmp of a prompt':38} {limit}")
    for size in SIZES:
        print(f"{'memcmp of a prompt, cold':38} {size:9,} blocks {time_limit(size // PROMPT_BLOCKS)}")
    memory = {"one": bytes_per_block(SIZES[1], PROMPT_BLOCKS), "wide": bytes_per_block(SIZES[1], 1)}
    print(f"bytes per block of 16 tokens, 64 of them the tokens: {memory}")
    timings: dict[str, dict[int, list[Timing]]] = {}
    for _ in range(args.rounds):
        for size in SIZES:
            for rows in (*(time_matches(shape, size) for shape in NODES), time_wide(size)):
                for name, timing in rows:
                    timings.setdefault(name, {}).setdefault(size, []).append(timing)
    results = {name: judge(name, by_size) for name, by_size in timings.items()}
    print("Medians of the rounds (lowest, highest) in µs, at 100,000 and at 1,000,000 blocks; growth:")
    for name, result in results.items():
        cells = [
            f"{us} ({low}, {high})" for us, (low, high) in zip(result["us"], result["us_range"], strict=True)
        ]
        verdict = {None: "", True: "pass", False: "FAIL"}[result.get("reached")]
        print(f"{name:42} {cells[0]:>22} {cells[1]:>22} {result['growth']:6} {verdict}")
    one_us = results["match one repeated"]["us"][0]
    report(
        "radix_tree",
        {
            "limit_share": round(limit.median_us / one_us, 2),
            "bytes_per_block": {shape: round(count) for shape, count in memory.items()},
            "results": results,
        },
    )
    return exit_status(results)


if __name__ == "__main__":
    sys.exit(main())
