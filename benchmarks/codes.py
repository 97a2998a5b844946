"""Codes below four bits: their distortion on a Gaussian, and an ablation on the rewritten SmolLM2 beside gptq.

    python benchmarks/codes.py gaussian [--states 10,12,14,16] [--fit]
    python benchmarks/codes.py model OUT --calibration text:VALID.txt --test TEST.txt [--second OTHER.txt] [--bits 2,3,4]
                                         [--only trellis,gptq] [--samples 32] [--windows 16]

`gaussian`: mean squared error on draws of variance 1 beside the bound 4^-bits, and microseconds a weight; with --fit, the steps
of the lattices' stages with the least error.

`model`: perplexity on two texts by the protocol of benchmarks/table.py, on the model off its 4-bit grid (benchmarks/ungrid.py).
Rows of ABLATION for each number of bits: rotation, code, feedback, propagation, each left out or added alone. OUT holds
everything; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import time
from itertools import product
from pathlib import Path

import torch
import yaml
from table import HERE, run, second_text

from lrc.compress.forms.codes import code as codes
from lrc.compress.forms.codes.code import BITS, TILE, Code
from lrc.compress.quantize.encoding.feedback import ENCODERS
from lrc.plan.load_recipe import load_recipe

# name -> (recipe, settings)
ABLATION: dict[str, tuple[str, dict[str, object]]] = {
    "trellis": ("trellis", {}),
    "one-shot": ("trellis", {"propagate": "original"}),
    "one-shot, scalar": ("trellis", {"propagate": "original", "settings.code": "scalar"}),
    "one-shot, e8": ("trellis", {"propagate": "original", "settings.code": "e8"}),
    "one-shot, 1024 states": ("trellis", {"propagate": "original", "settings.state_bits": 10}),
    "one-shot, no rotation": ("trellis", {"propagate": "original", "settings.rotate": False}),
    "one-shot, no feedback": ("trellis", {"propagate": "original", "settings.feedback": False}),
    "gptq": ("gptq", {}),
    "gptq one-shot": ("gptq", {"propagate": "original"}),
    "gptq one-shot, no clip": ("gptq", {"propagate": "original", "settings.clip": False}),
    "gptq no clip": ("gptq", {"settings.clip": False}),
}


def measured(code: Code, tiles: int) -> tuple[float, float]:
    """(mean squared error, microseconds a weight) of a code on draws of variance 1."""
    values = torch.randn(tiles, TILE, generator=torch.Generator().manual_seed(1))
    ENCODERS[code.kind](values[:2], code)  # tables and compiled code are there before the clock starts
    start = time.process_time()
    packed = ENCODERS[code.kind](values, code)
    seconds = time.process_time() - start
    return float((code.values(packed) - values).square().mean()), seconds / values.numel() * 1e6


def gaussian(states: list[int], fit: bool) -> None:
    """Print the distortion of every code."""
    if fit:
        for bits, firsts, parts in ((2, (0.94, 0.97, 1.0, 1.03), (0.0,)), (3, (0.97, 1.0, 1.03, 1.06), (0.46, 0.5, 0.54)),
                                    (4, (1.1, 1.15, 1.2, 1.25), (0.26, 0.28, 0.3, 0.32))):  # fmt: skip
            tried = {}
            for steps in product(firsts, parts):
                codes.LATTICE_STEPS[bits] = steps
                tried[steps] = measured(Code("e8", bits), 400)[0]
            print(f"e8, {bits} bits: {min(tried, key=tried.__getitem__)}")
        return
    print("| code | bits | distortion | times the bound | microseconds a weight |\n|---|---|---|---|---|")
    every = [Code(kind, bits) for kind in ("scalar", "e8") for bits in BITS[kind]]
    every += [Code("trellis", bits, each) for each in states for bits in BITS["trellis"]]
    for code in every:
        lost, each = measured(code, 512 if code.state_bits <= 12 else 64)
        name = code.kind + (f", 2^{code.state_bits} states" if code.state_bits else "")
        print(f"| {name} | {code.bits} | {lost:.5f} | {lost * 4**code.bits:.3f} | {each:.2f} |", flush=True)


def on_model(arguments: argparse.Namespace) -> None:
    """Compress and evaluate the rows of the ablation."""
    out: Path = arguments.out
    (out / "recipes").mkdir(parents=True, exist_ok=True)
    second = arguments.second or second_text(out / "docstrings.txt", 40_000)
    given = []
    for bits, name in product(map(int, arguments.bits.split(",")), arguments.only.split(",") if arguments.only else ABLATION):
        recipe, settings = ABLATION[name]
        file = out / "recipes" / f"{bits} bits, {name}.yaml".replace(", ", "_").replace(" ", "-")
        file.write_text(yaml.safe_dump(load_recipe(recipe, settings | {"settings.bits": bits}).resolved(), sort_keys=False))
        given.append(str(file))
    if not (out / "ungrid" / "config.json").is_file():
        run(str(HERE / "ungrid.py"), str(out / "ungrid"))
    run(
        "-m", "lrc.cli", "sweep", str(out / "ungrid"), "--recipes", ",".join(given), "--out", str(out / "rows"),
        "--tasks", f"text:{arguments.test},text:{second}", "--max-windows", str(arguments.windows), "--dtype", "bfloat16",
        "--calibration", arguments.calibration, "--samples", str(arguments.samples), "--length", "2048",
        "--set", "calibration.held_out=4",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="what", required=True)
    draws = parts.add_parser("gaussian")
    draws.add_argument("--states", default="10,12")
    draws.add_argument("--fit", action="store_true")
    model = parts.add_parser("model")
    model.add_argument("out", type=Path)
    model.add_argument("--calibration", required=True)
    model.add_argument("--test", type=Path, required=True)
    model.add_argument("--second", type=Path)
    model.add_argument("--bits", default="2,3,4")
    model.add_argument("--only")
    model.add_argument("--samples", type=int, default=32)
    model.add_argument("--windows", type=int, default=16)
    arguments = parser.parse_args()
    if arguments.what == "gaussian":
        gaussian([int(each) for each in arguments.states.split(",")], arguments.fit)
    else:
        on_model(arguments)


if __name__ == "__main__":
    main()
