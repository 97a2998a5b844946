"""The solver on a problem of a 70B model's shape: seconds, and how far the relaxation is from the exact answer.

80 layers × 7 targets × 60 options, losses that fall as random powers of the size, scales that differ by orders of magnitude.

    python benchmarks/cost/solver.py [--layers 80] [--options 60] [--seed 0]
"""

from __future__ import annotations

import argparse
import random
import time

from lrc.compress.options import Choice
from lrc.plan.knapsack import PredictedOption, solve

SHAPES = ((8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28672, 8192), (28672, 8192), (8192, 28672))


def problem(layers: int, count: int, seed: int) -> dict[str, list[PredictedOption]]:
    """`count` low-rank options of every target, and the dense one."""
    chance = random.Random(seed)
    found = {}
    for layer in range(layers):
        for number, (out, width) in enumerate(SHAPES):
            scale, power, dense = chance.lognormvariate(0, 2), chance.uniform(0.5, 2), 2 * out * width
            ranks = [(i + 1) * (out * width // (out + width)) // (count + 1) for i in range(count)]
            options = [
                PredictedOption(Choice(rank=r), 2 * r * (out + width), scale * (1 - r * (out + width) / out / width) ** power)
                for r in ranks
            ]
            found[f"{layer}.{number}"] = [*options, PredictedOption(Choice(), dense, 0.0)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--options", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    options = problem(arguments.layers, arguments.options, arguments.seed)
    dense = sum(offered[-1].nbytes for offered in options.values())
    print(f"{len(options)} targets × {arguments.options + 1} options, {dense / 1e9:.1f} GB dense")
    for ratio in (0.1, 0.2, 0.4, 0.6, 0.8):
        started = time.perf_counter()
        found = solve(options, int((1 - ratio) * dense))
        above = (found.loss - found.bound) / found.bound
        print(
            f"ratio {ratio}: {time.perf_counter() - started:.2f} s, loss {above:.2e} above the bound, "
            f"{'exact' if found.exact else f'gap {found.gap:.2e}'}"
        )


if __name__ == "__main__":
    main()
