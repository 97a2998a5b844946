"""Output error on text that calibration never saw, method against method at the same rank or the same bits.

    python benchmarks/quality/output_error.py MODEL --calibration text:VALID.txt --held-out text:OTHER.txt [--samples 32]
        [--length 2048] [--methods svd-llm,lord] [--ratios 0.2,0.4]        # the rank of svd-llm at these ratios, for all
        [--quantizers rtn,lqer,qera,gptq] [--bits 2,3,4] [--group-size 64] [--rank 32]

For every target E‖W x - (W' x + b)‖² / E‖W x‖² over the held-out tokens, in float64 from their second moments and means; the
table shows the mean over all targets, and how many targets each method serves better than the first one. Quantizers are to
be measured on the rewritten model (benchmarks/quality/ungrid.py).
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from lrc.calibrate.collect import collect, targets_by_layer
from lrc.calibrate.data import CalibrationSpec, load_calibration
from lrc.calibrate.gradients import GradientSettings
from lrc.checkpoint.location import locate
from lrc.commands.common.arguments import quiet
from lrc.compress.base import TargetStats, get_method
from lrc.compress.options import Choice, break_even
from lrc.model.layer_forms import target_weight
from lrc.model.view import ModelView
from lrc.plan.units import shape_of


def held_out_error(weight: Tensor, form: Any, stats: TargetStats) -> float:
    """Mean squared output error of a form, relative to the mean square of the outputs.

    Args:
        weight: (out, in).
        form: in float64.
        stats: of held-out tokens, with gram and mean.
    """
    assert stats.group.gram is not None
    assert stats.group.mean is not None
    gram, mean = stats.group.gram.double(), stats.group.mean.double()
    lost = weight.double() - form.dense().double()
    bias = getattr(form, "bias", None)
    bias = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.double()
    error = ((lost @ gram) * lost).sum() - 2 * bias @ (lost @ mean) + bias @ bias
    whole = ((weight.double() @ gram) * weight.double()).sum()
    return float(error / whole)


def contenders(arguments: argparse.Namespace) -> list[tuple[str, str, str, dict[str, Any], float | None]]:
    """(block, row, method, settings, ratio that the rank comes from)."""
    found: list[tuple[str, str, str, dict[str, Any], float | None]] = []
    for ratio in arguments.ratios.split(","):
        for name in filter(None, arguments.methods.split(",")):
            found.append((f"rank at {ratio}", name, name, {}, float(ratio)))
            if name == "lord":
                found.append((f"rank at {ratio}", "lord, centre: false", name, {"centre": False}, float(ratio)))
    for bits in arguments.bits.split(","):
        for name in filter(None, arguments.quantizers.split(",")):
            settings: dict[str, Any] = {"bits": int(bits), "group_size": arguments.group_size}
            if name not in ("rtn", "gptq"):
                settings["rank"] = arguments.rank
            found.append((f"{bits} bit", name, name, settings, None))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--held-out", required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--methods", default="svd-llm,lord")
    parser.add_argument("--ratios", default="0.2,0.4")
    parser.add_argument("--quantizers", default="")
    parser.add_argument("--bits", default="4")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rank", type=int, default=32)
    arguments = parser.parse_args()
    quiet()
    view = ModelView(locate(arguments.model))
    rows = contenders(arguments)
    needs = frozenset[str]().union(*(get_method(name).all_needs for _, _, name, _, _ in rows))
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        stores = []
        for part, source, asked in (("seen", arguments.calibration, needs), ("new", arguments.held_out, {"gram", "mean"})):
            spec = CalibrationSpec(source=source, samples=arguments.samples, length=arguments.length)
            tokens = load_calibration(spec, view.location.tokenizer())
            folder = Path(scratch) / part
            every = {target.name: frozenset(asked) for target in view.targets}
            stores.append(collect(view, tokens, every, folder, [torch.device("cpu")], GradientSettings()))
        for name, targets in zip(view.layer_names, targets_by_layer(view), strict=True):
            layer = view.load(name)
            for target in targets:
                weight = target_weight(layer, name, target)[0].clone()
                seen, new = (store.read(name, [target.name])[target.name] for store in stores)
                shape = shape_of(target, 4)
                solutions: dict[str, Any] = {}  # of a method with its settings; it answers every rank
                for block, row, method_name, given, ratio in rows:
                    method, key = get_method(method_name), f"{method_name} {given}"
                    settings = method.settings(**given)
                    if key not in solutions:
                        solutions[key] = method.solve(weight, seen, settings)
                    if ratio is None:
                        choice = method.options(shape, settings, 1)[0].choice
                    else:
                        choice = Choice(rank=int((1 - ratio) * break_even(shape.out_features, shape.in_features)))
                    form = solutions[key].form(choice)
                    errors[block, row].append(held_out_error(weight, form, new))
            view.unload(name)
            print(f"{name} done", flush=True)
    first: dict[str, list[float]] = {}
    print(f"{'':<12}{'':<22}{'mean error':>12}{'better than the first on':>28}")
    for (block, row), values in errors.items():
        base = first.setdefault(block, values)
        better = sum(mine < other for mine, other in zip(values, base, strict=True))
        print(f"{block:<12}{row:<22}{fmean(values):>12.6f}{f'{better} of {len(values)}' if values is not base else '':>28}")


if __name__ == "__main__":
    main()
