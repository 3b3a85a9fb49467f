"""Llama-3.1-8B's shape with random bfloat16 weights, offline: `LLM` on a GPU, and what it is compared with.

    python bench/gpu/bench_offline.py [--requests 1000] [--transformers] [-- NAME=VALUE of EngineConfig ...]

decode1: one stream of 512 tokens behind a short prompt, against reading the weights once a token at the
measured bandwidth of a copy. streams: 64 at once, 1,024 in and 256 out. chats: --requests prompts of 20 to
600 tokens and answers of 50 to 400, fixed seed. shared: 256 requests with 2,048 common tokens, with and
without the prefix cache. --transformers runs `streams` through transformers' continuous batching on the same
card. An answer that has not exactly the tokens asked for ends the bench. The last line is one JSON object.
Times to the first token and between tokens are those of a server: bench/serving/bench_streams64.py.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from device import copy_bandwidth, need_gpu, report

from engine import LLM, SamplingParams
from engine.config.model_location import bundled_model

SHAPE = Path(__file__).parents[1] / "serving" / "llama8b.json"
WEIGHT_BYTES = 2 * (32 * (4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336) + 128256 * 4096)
"""Read for a token: the embedding is not, but for a row."""

Lengths = list[tuple[int, int]]


def run(llm: LLM, lengths: Lengths, *, seed: int, common: int = 0) -> dict[str, float]:
    """Tokens a second of greedy answers to random prompts of given lengths."""
    draw = random.Random(seed)
    prefix = [draw.randrange(1000, 100_000) for _ in range(common)]
    prompts = [prefix + [draw.randrange(1000, 100_000) for _ in range(count)] for count, _ in lengths]
    params = [SamplingParams(temperature=0.0, max_tokens=out, ignore_eos=True) for _, out in lengths]
    began = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - began
    for output, (_, expected) in zip(outputs, lengths, strict=True):
        if len(output.outputs[0].token_ids) != expected:
            sys.exit(f"an answer has {len(output.outputs[0].token_ids)} tokens, {expected} were asked for")
    num_out = sum(out for _, out in lengths)
    return {"seconds": seconds, "output_tok_s": num_out / seconds, "requests": len(lengths)}


def chats(count: int) -> Lengths:
    draw = random.Random(0)
    return [(draw.randint(20, 600), draw.randint(50, 400)) for _ in range(count)]


def by_transformers(directory: Path, lengths: Lengths) -> dict[str, float]:
    """`streams` with transformers' continuous batching."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    draw = random.Random(2)
    prompts = [[draw.randrange(1000, 100_000) for _ in range(count)] for count, _ in lengths]
    settings = transformers.GenerationConfig(max_new_tokens=lengths[0][1], do_sample=False, eos_token_id=-1)
    model.generate_batch(inputs=prompts[:4], generation_config=settings)
    began = time.perf_counter()
    model.generate_batch(inputs=prompts, generation_config=settings)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "output_tok_s": sum(out for _, out in lengths) / seconds}


def read_arguments() -> tuple[argparse.Namespace, dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--transformers", action="store_true")
    parser.add_argument("options", nargs="*", metavar="NAME=VALUE")
    args = parser.parse_args()
    options = dict(option.split("=", 1) for option in args.options)
    return args, {
        name: json.loads(value) if value in ("true", "false") or value[:1].isdigit() else value
        for name, value in options.items()
    }


def main() -> None:
    args, options = read_arguments()
    need_gpu()
    streams = [(1024, 256)] * 64
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(SHAPE.read_text())
        if args.transformers:
            results["transformers"] = by_transformers(Path(directory), streams)
        else:
            results = ours(directory, options, streams, args.requests)
    for name, figures in results.items():
        print(f"{name:12}", "  ".join(f"{key} {value:,.2f}" for key, value in figures.items()))
    report("gpu_offline", results)


def ours(directory: str, options: dict[str, Any], streams: Lengths, num_requests: int) -> dict[str, Any]:
    tokenizer = str(bundled_model())  # prompts are token ids; it is only there
    fields = {"device": "cuda", "load_format": "dummy", "tokenizer_path": tokenizer, "context_length": 8192}
    fields |= options
    bandwidth = copy_bandwidth()
    results: dict[str, Any] = {}
    with LLM(directory, **fields) as llm:
        run(llm, [(100, 40)] * 64, seed=1)  # compiles, and captures the first graphs
        one = run(llm, [(32, 512)], seed=2)
        one["share_of_bandwidth"] = one["output_tok_s"] * WEIGHT_BYTES / bandwidth
        results["decode1"] = one
        results["streams"] = run(llm, streams, seed=3)
        results["chats"] = run(llm, chats(num_requests), seed=4)
        results["shared"] = run(llm, [(64, 64)] * 256, seed=5, common=2048)
    with LLM(directory, **fields, disable_radix_cache=True) as llm:
        run(llm, [(100, 40)] * 64, seed=1)
        results["not_shared"] = run(llm, [(64, 64)] * 256, seed=5, common=2048)
    return results


if __name__ == "__main__":
    main()
