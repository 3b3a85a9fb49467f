"""Two commands in turns, and the ratio of one figure: what a speed claim quotes.

    python bench/compare_commands.py --figure output_tok_s [--rounds 5] "COMMAND A" "COMMAND B"

Each command is a bench: the last line of its output is one JSON object. `--figure` names a number in
it, with dots for what lies deeper (steps.0.ms). To compare two servers without starting them each
time, give both to the same bench by --base-url, with --rounds 1. Rounds alternate which command goes
first, so that drift of the machine harms both alike.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess

from harness import machine, report


def measure(command: str, figure: str) -> float:
    """Run one bench. Raises: `CalledProcessError` when it fails, `KeyError` without the figure."""
    output = subprocess.run(shlex.split(command), stdout=subprocess.PIPE, text=True, check=True).stdout
    value = json.loads(output.splitlines()[-1])
    for name in figure.split("."):
        value = value[int(name)] if isinstance(value, list) else value[name]
    return float(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("a")
    parser.add_argument("b")
    args = parser.parse_args()
    print(f"{machine()}\nA: {args.a}\nB: {args.b}\n\n{args.figure:>20} A{'B':>12}{'A / B':>9}")
    samples: list[tuple[float, float]] = []
    for index in range(args.rounds):
        if index % 2 == 0:
            a = measure(args.a, args.figure)
            b = measure(args.b, args.figure)
        else:
            b = measure(args.b, args.figure)
            a = measure(args.a, args.figure)
        samples.append((a, b))
        print(f"{a:22.3f}{b:12.3f}{a / b:9.3f}", flush=True)
    medians = [statistics.median(side) for side in zip(*samples, strict=True)]
    ratios = [a / b for a, b in samples]
    ratio = medians[0] / medians[1]
    print(f"\nmedians: A {medians[0]:.3f}, B {medians[1]:.3f}")
    print(f"A / B = {ratio:.3f}, single rounds {min(ratios):.3f} to {max(ratios):.3f}\n")
    report(
        "compare",
        {
            "commands": [args.a, args.b],
            "figure": args.figure,
            "rounds": args.rounds,
            "medians": medians,
            "ratio_of_medians": ratio,
            "ratios": ratios,
        },
    )


if __name__ == "__main__":
    main()
