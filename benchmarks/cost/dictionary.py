"""The two forwards of a dictionary target, gathering and expanding, over the number of tokens, and the dense product.

`GATHER_UP_TO` in compress/forms/dictionary.py is the number of tokens up to which gathering was the faster on all of these
shapes. Milliseconds on one x86 core, torch 2.13, share 0.27, gather / expand / dense (2026-11-24, beside other jobs):

                             1 token        256 tokens        512 tokens       1024 tokens       2048 tokens
    float32
    1536 x 576    0.2 /   2.4 / 0.05  2.3 / 4.9 / 4.4   4.2 / 7.3 / 8.6    11 /  13 /  17    23 /  23 /  34
    2048 x 2048   1.1 /  11.8 / 0.4    12 /  23 /  22    32 /  35 /  43    58 /  55 /  83   111 / 101 / 166
    bfloat16
    1536 x 576    0.2 /   2.3 / 0.06  1.1 / 2.9 / 0.9   2.3 / 3.3 / 2.0   9.4 / 8.6 / 3.9    21 /  11 /  12
    2048 x 2048   1.3 /  23.4 / 0.3    16 /  28 / 8.7    32 /  32 /  21    76 /  45 /  39   150 /  64 /  76

Gather and expand are told without the product with the atoms, which both need. For single tokens the dense product is
faster still: what a dictionary saves is bytes. Not measured on a GPU, where the crossover lies elsewhere.

    python benchmarks/cost/dictionary.py [--dtype float32] [--device cpu] [--threads 1] [--share 0.27]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn

from lrc.compress.forms.base import build_module, fill_module
from lrc.compress.forms.dictionary import Dictionary, DictionaryLinear

SHAPES = [(576, 576), (1536, 576), (576, 1536), (2048, 2048), (8192, 2048)]
TOKENS = [1, 8, 64, 128, 256, 512, 1024, 2048]


def module(out_features: int, in_features: int, share: float, dtype: torch.dtype, device: str) -> DictionaryLinear:
    """Random codes, half of them zero, over `share` of min(out, in) atoms times two."""
    atoms = int(2 * share * min(out_features, in_features))
    mask = torch.rand(out_features, atoms) < 0.5
    form = Dictionary.of(torch.randn(mask.shape) * mask, mask, torch.randn(atoms, in_features)).stored(dtype)
    empty = build_module(form.spec(), in_features, out_features, dtype)
    made = fill_module(empty, {name: tensor.to(device) for name, tensor in form.tensors().items()})
    assert isinstance(made, DictionaryLinear)
    return made


def seconds(call: Callable[[], object], device: str, least: float = 0.15) -> float:
    """Median time of one call."""
    times: list[float] = []
    call()
    started = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - started < least:
        if device != "cpu":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--share", type=float, default=0.27, help="nonzeros per row as a part of min(out, in)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    print(f"milliseconds, {arguments.dtype}, {arguments.device}: gather / expand / dense")
    print(f"{'out x in':>12}" + "".join(f"{tokens:>22}" for tokens in TOKENS))
    for out_features, in_features in SHAPES:
        sparse = module(out_features, in_features, arguments.share, dtype, arguments.device)
        dense = torch.randn(out_features, in_features, dtype=dtype, device=arguments.device)
        line = f"{f'{out_features} x {in_features}':>12}"
        with torch.inference_mode():
            for tokens in TOKENS:
                x = torch.randn(tokens, in_features, dtype=dtype, device=arguments.device)
                z = nn.functional.linear(x, sparse.weight)
                calls = [
                    lambda z=z, sparse=sparse: sparse.gather(z),
                    lambda z=z, sparse=sparse: sparse.multiply(z),
                    lambda x=x, dense=dense: nn.functional.linear(x, dense),
                ]
                line += f"{' / '.join(f'{1000 * seconds(call, arguments.device):.2f}' for call in calls):>22}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
