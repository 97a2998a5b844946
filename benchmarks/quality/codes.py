"""Codes below four bits: their distortion on a Gaussian, and an ablation on the rewritten SmolLM2 beside gptq.

    python benchmarks/quality/codes.py gaussian [--states 10,12,14,16] [--fit]
    python benchmarks/quality/codes.py model OUT --calibration text:VALID.txt --test TEST.txt [--second OTHER.txt]
                                         [--bits 2,3,4] [--only trellis,gptq] [--samples 32] [--windows 16]
    python benchmarks/quality/codes.py errors MODEL --calibration text:PART1.txt --held-out text:PART2.txt [--layers 15]
                                            [--bits 2,3,4] [--samples 8] [--length 1024]

`gaussian`: mean squared error on draws of variance 1 beside the bound 4^-bits, and microseconds a weight; with --fit, the steps
of the lattices' stages with the least error.

`model`: perplexity on two texts by the protocol of benchmarks/quality/table.py, on the model off its 4-bit grid
(benchmarks/quality/ungrid.py). Rows of ABLATION for each number of bits: gradients, rotation, code, feedback, propagation,
each left out or added alone. OUT holds everything; the same command goes on where it was stopped.

`errors`: output errors on text that calibration never saw, relative to the outputs, over the targets of some layers: the parts
of a code each alone and together, one-shot, in minutes a layer.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from output_error import held_out_error
from table import HERE, run, second_text

from lrc.calibrate.collect import collect
from lrc.calibrate.data import CalibrationSpec, load_calibration
from lrc.calibrate.gradients import GradientSettings
from lrc.checkpoint.location import locate
from lrc.commands.common.arguments import quiet
from lrc.compress.base import get_method
from lrc.compress.forms.codes import code as codes
from lrc.compress.forms.codes.code import BITS, TILE, Code
from lrc.compress.quantize.encoding.feedback import ENCODERS
from lrc.model.layer_forms import target_weight
from lrc.model.view import ModelView
from lrc.plan.load_recipe import load_recipe
from lrc.plan.units import shape_of

# name -> (recipe, settings)
ABLATION: dict[str, tuple[str, dict[str, object]]] = {
    "yaqa, bits by kl": ("yaqa", {"settings.bits": None, "allocation": "kl"}),
    "yaqa": ("yaqa", {}),
    "yaqa one-shot": ("yaqa", {"propagate": "original"}),
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


# name -> (method, settings): what `errors` compares
PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn, groups of 64": ("rtn", {}),
    "gptq, groups of 64": ("gptq", {}),
    "gptq, groups of 64, clip": ("gptq", {"clip": True}),
    "scalar": ("trellis", {"code": "scalar", "rotate": False, "feedback": False}),
    "scalar, rotation": ("trellis", {"code": "scalar", "feedback": False}),
    "scalar, feedback": ("trellis", {"code": "scalar", "rotate": False}),
    "scalar, rotation, feedback": ("trellis", {"code": "scalar"}),
    "e8, rotation, feedback": ("trellis", {"code": "e8"}),
    "trellis 2^12": ("trellis", {"rotate": False, "feedback": False}),
    "trellis 2^12, rotation": ("trellis", {"feedback": False}),
    "trellis 2^12, feedback": ("trellis", {"rotate": False}),
    "trellis 2^10, rotation, feedback": ("trellis", {"state_bits": 10}),
    "trellis 2^12, rotation, feedback": ("trellis", {}),
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


def errors(arguments: argparse.Namespace) -> None:
    """Print held-out output errors of every combination of the parts of a code."""
    quiet()
    view, layers = ModelView(locate(arguments.model)), [int(each) for each in arguments.layers.split(",")]
    targets = [target for target in view.targets if target.layer in layers]
    with tempfile.TemporaryDirectory() as scratch:
        stores = []
        for part, source, asked in (("seen", arguments.calibration, {"gram"}), ("new", arguments.held_out, {"gram", "mean"})):
            spec = CalibrationSpec(source=source, samples=arguments.samples, length=arguments.length)
            tokens = load_calibration(spec, view.location.tokenizer())
            every = {target.name: frozenset(asked) for target in targets}
            stores.append(collect(view, tokens, every, Path(scratch) / part, [torch.device("cpu")], GradientSettings()))
        print("| bits | code | bits stored | mean error | seconds |\n|---|---|---|---|---|")
        for bits, (row, (name, given)) in product(map(int, arguments.bits.split(",")), PARTS.items()):
            method, lost, stored, seconds = get_method(name), [], 0, 0.0
            settings = method.settings(**given | {"bits": bits})
            for target in targets:
                layer = view.layer_names[target.layer]
                weight = target_weight(view.load(layer), layer, target)[0].clone()
                view.unload(layer)
                seen, new = (store.read(layer, [target.name])[target.name] for store in stores)
                (option,) = method.options(shape_of(target, 2), settings, 1)
                start = time.process_time()
                form = method.solve(weight, seen, settings).form(option.choice)
                seconds += time.process_time() - start
                lost.append(held_out_error(weight, form, new))
                stored += option.nbytes
            each = 8 * stored / sum(target.numel for target in targets)
            print(f"| {bits} | {row} | {each:.3f} | {fmean(lost):.5f} | {seconds:.1f} |", flush=True)


def on_model(arguments: argparse.Namespace) -> None:
    """Compress and evaluate the rows of the ablation."""
    out: Path = arguments.out
    (out / "recipes").mkdir(parents=True, exist_ok=True)
    second = arguments.second or second_text(out / "docstrings.txt", 40_000)
    given = []
    for bits, name in product(map(int, arguments.bits.split(",")), arguments.only.split(",") if arguments.only else ABLATION):
        recipe, settings = ABLATION[name]
        file = out / "recipes" / f"{bits} bits, {name}.yaml".replace(", ", "_").replace(" ", "-")
        asked = {"bits": bits} if "allocation" in settings else {"settings.bits": bits}  # on average, or for every target
        file.write_text(yaml.safe_dump(load_recipe(recipe, settings | asked).resolved(), sort_keys=False))
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
    parts_of = parts.add_parser("errors")
    parts_of.add_argument("model")
    parts_of.add_argument("--calibration", required=True)
    parts_of.add_argument("--held-out", required=True)
    parts_of.add_argument("--layers", default="15")
    parts_of.add_argument("--bits", default="2,3,4")
    parts_of.add_argument("--samples", type=int, default=8)
    parts_of.add_argument("--length", type=int, default=1024)
    arguments = parser.parse_args()
    if arguments.what == "gaussian":
        gaussian([int(each) for each in arguments.states.split(",")], arguments.fit)
    elif arguments.what == "errors":
        errors(arguments)
    else:
        on_model(arguments)


if __name__ == "__main__":
    main()
