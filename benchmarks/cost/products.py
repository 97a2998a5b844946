"""What full precision gains on this processor (model/machine/precision.py): float32 and 16-bit products, and attention.

AMD EPYC (Zen 5, AVX-512 with bfloat16, no matrix tiles), one core, torch 2.13 with MKL 2024.2 and oneDNN 3.12:

                                                        before     after   ms; float32 products: highest, by oneDNN
    float32, 2048 x 576 x 1536                           35.52     13.94    2.55 times
    float32, 2048 x 2048 x 2048                         151.20     69.11    2.19 times
    float32, 2048 x 576 x 49152                        1257.23    642.51    1.96 times
    float32, 64 x 2048 x 2048                             5.32      2.48    2.15 times
    float32, 1 x 2048 x 2048                              0.24      0.48    0.49 times
    bfloat16 attention, 9 heads of 64, 2048 tokens       64.41     34.71    1.86 times
    bfloat16 attention, 32 heads of 128, 2048 tokens    434.94    256.20    1.70 times

AMD EPYC (Zen 2, AVX2 alone), one core, the same libraries:

                                                        before     after   ms; float32 products: highest
    float32, 2048 x 576 x 1536                           54.02     53.18    1.02 times
    bfloat16, 2048 x 576 x 1536                         483.23     55.66    8.68 times
    float16, 2048 x 576 x 1536                          347.97     55.92    6.22 times
    bfloat16, 2048 x 576 x 49152                      20087.63   2114.88    9.50 times
    float16, 2048 x 576 x 49152                       15851.75   2143.06    7.40 times
    bfloat16, 64 x 2048 x 2048                           66.35      9.95    6.67 times
    float16, 64 x 2048 x 2048                            46.11      9.79    4.71 times
    bfloat16 attention, 9 heads of 64, 2048 tokens      113.65    110.93    1.02 times

AMD EPYC (Zen 4, AVX-512 with bfloat16 in halves), one core, the same libraries; what nothing was done to varies by 8 % too:

                                                        before     after   ms; float32 products: highest, by oneDNN
    float32, 2048 x 576 x 1536                           47.31     38.46    1.23 times
    bfloat16, 2048 x 576 x 1536                          18.26     19.46    0.94 times
    float16, 2048 x 576 x 1536                          213.76     40.48    5.28 times
    float32, 2048 x 2048 x 2048                         231.79    174.69    1.33 times
    float32, 2048 x 576 x 49152                        1543.33   1481.25    1.04 times
    bfloat16, 2048 x 576 x 49152                        694.08    744.29    0.93 times
    float16, 2048 x 576 x 49152                        7389.58   1381.44    5.35 times
    float32, 64 x 2048 x 2048                            10.02      6.34    1.58 times
    bfloat16, 64 x 2048 x 2048                            3.43      3.18    1.08 times
    float16, 64 x 2048 x 2048                            31.07      7.00    4.44 times
    float32, 1 x 2048 x 2048                              1.01      1.30    0.78 times
    bfloat16 attention, 9 heads of 64, 2048 tokens       87.30     84.11    1.04 times
    bfloat16 attention, 32 heads of 128, 2048 tokens    564.42    605.14    0.93 times

    python benchmarks/cost/products.py [--threads 1]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from lrc.model.machine.precision import float32_products, full_precision

SHAPES = [(2048, 576, 1536), (2048, 2048, 2048), (2048, 576, 49152), (64, 2048, 2048), (1, 2048, 2048)]
SIXTEEN = [(2048, 576), (64, 2048)]  # of these in 16 bits as well
HEADS = [(9, 3, 64), (32, 8, 128)]  # queries, keys and values, width


def milliseconds(call: Callable[[], object]) -> float:
    """Median of one call."""
    times: list[float] = []
    call()
    while len(times) < 5 or sum(times) < 0.3:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return 1000 * sorted(times)[len(times) // 2]


def calls() -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    found: dict[str, Callable[[], Any]] = {}
    for rows, inner, columns in SHAPES:
        x, weight = torch.randn(rows, inner), torch.randn(columns, inner)
        for dtype in (torch.float32, torch.bfloat16, torch.float16) if (rows, inner) in SIXTEEN else (torch.float32,):
            given = x.to(dtype), weight.to(dtype)
            name = f"{str(dtype).removeprefix('torch.')}, {rows} x {inner} x {columns}"
            found[name] = lambda given=given: nn.functional.linear(*given)
    for heads, shared, width in HEADS:
        module = nn.Module()
        module.num_key_value_groups, module.is_causal = heads // shared, True
        query, key, value = (torch.randn(1, count, 2048, width, dtype=torch.bfloat16) for count in (heads, shared, shared))
        found[f"bfloat16 attention, {heads} heads of {width}, 2048 tokens"] = (
            lambda module=module, query=query, key=key, value=value: AttentionInterface()["sdpa"](
                module, query, key, value, None
            )
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    timed = calls()
    with torch.inference_mode():
        before = {name: milliseconds(call) for name, call in timed.items()}
        with full_precision:
            after = {name: milliseconds(call) for name, call in timed.items()}
            print(f"{'':48}{'before':>10}{'after':>10}   ms; float32 products: {float32_products()}")
    for name in timed:
        print(f"{name:48}{before[name]:10.2f}{after[name]:10.2f}{before[name] / after[name]:8.2f} times")


if __name__ == "__main__":
    main()
