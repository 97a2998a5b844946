"""The survey: what every way of storing every target would lose, measured before the budget is shared out.

One pass over the calibration tokens collects the statistics of the original model into a `StatsStore`, layer by layer; each
target is solved once, and the losses of its offers become its curve. Curves are small (numbers, not matrices) and lie beside
the statistics, so that an interrupted survey goes on where it stopped, and the next ratio needs no survey at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .assemble import target_weight
from .calibrate.data import Calibration
from .calibrate.stats import wanted
from .calibrate.store import StatsStore
from .calibrate.stream import Call
from .compress.base import Choice, Curve, Offer, Shape, Solution
from .errors import OutputError
from .model import ModelView, Target
from .passes import full_precision, give_back, run_batches, steady_memory, through_layers
from .plan import TOKENS_PER_BATCH
from .recipe import Recipe

MOST_OPTIONS = 64  # of one target; more ranks than these change an allocation by less than the prediction's own error


def thinned(offers: Sequence[Offer], most: int = MOST_OPTIONS) -> list[Offer]:
    """At most `most` of the offers, evenly spaced, the smallest and the largest among them."""
    if len(offers) <= most:
        return list(offers)
    return [offers[round(i * (len(offers) - 1) / (most - 1))] for i in range(most)]


def collect(
    view: ModelView,
    calibration: Calibration,
    needs: frozenset[str],
    folder: Path,
    devices: Sequence[torch.device],
    notify: Callable[[int, float], None] = lambda layer, seconds: None,
) -> StatsStore:
    """Statistics of the original model for all targets, on disk; what lies there of the same model and tokens is used.

    Args:
        needs: of `base.FORWARD_NEEDS`.
        folder: where they go; disk space of 4 bytes per entry of every gram.
        notify: called with (layers finished, seconds).
    """
    full_precision()
    steady_memory()
    identity = {"model": view.source.fingerprint(), "tokens": calibration.hash, "dtype": str(view.dtype)}
    store = StatsStore(folder, identity, needs)
    if all(store.has(name) for name in view.layer_names):
        return store
    by_layer = targets_by_layer(view)
    missing = sum(
        wanted(targets, store.needs).nbytes(targets)
        for name, targets in zip(view.layer_names, by_layer, strict=True)
        if not store.has(name)
    )
    free = shutil.disk_usage(folder).free
    if free < missing:
        raise OutputError(
            f"{folder} has {free / 1e9:,.1f} GB free; the statistics take {missing / 1e9:,.1f} GB.",
            "Free some space, give --statistics a folder on another disk, or use --set allocation=uniform, which keeps none.",
        )
    batch = max(1, TOKENS_PER_BATCH // calibration.tokens.shape[1])

    def visit(index: int, name: str, layer: nn.Module, calls: Sequence[Call]) -> list[Any] | None:
        started = time.perf_counter()
        targets = by_layer[index]
        if store.has(name):
            outputs = None if index == len(by_layer) - 1 else run_batches(layer, name, calls, devices)[0]
        else:
            outputs, stats = run_batches(layer, name, calls, devices, targets, wanted(targets, store.needs))
            store.write(name, stats)
        notify(index + 1, time.perf_counter() - started)
        return outputs

    with torch.no_grad():
        through_layers(view, calibration.tokens.split(batch), visit)
    return store


def targets_by_layer(view: ModelView) -> list[list[Target]]:
    """The targets of each layer, in the order of a forward."""
    found: list[list[Target]] = [[] for _ in view.layers]
    for target in view.targets:
        found[target.layer].append(target)
    return found


def measure(
    view: ModelView,
    recipe: Recipe,
    store: StatsStore,
    keep: frozenset[str],
    device: torch.device,
    notify: Callable[[int, float], None] = lambda layer, seconds: None,
) -> dict[str, Curve]:
    """The curve of every target that is not in `keep`, by the recipe's method, from the statistics in the store."""
    method, settings = recipe.compression
    element = torch.empty((), dtype=view.dtype).element_size()
    asked = {"method": method.name, "settings": settings.model_dump(mode="json"), "multiple": recipe.rank_multiple}
    tag = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    curves: dict[str, Curve] = {}
    for index, targets in enumerate(targets_by_layer(view)):
        started, name = time.perf_counter(), view.layer_names[index]
        file = store.folder / f"{name}.curves-{tag}.json"
        held = _read(file)
        missing = [target for target in targets if target.name not in held and target.name not in keep]
        if missing:
            layer = view.load(name)
            stats = store.read(name, [target.name for target in missing])
            for target in missing:
                shape = Shape(target.out_features, target.in_features, element, target.bias)
                offers = thinned(method.offers(shape, settings, recipe.rank_multiple))
                weight = target_weight(layer, name, target)[0].to(device)
                held[target.name] = _curve(method.solve(weight, stats.pop(target.name), settings), offers)
            view.unload(name)
            give_back()
            _write(file, held)
        curves |= {target.name: held[target.name] for target in targets if target.name not in keep}
        notify(index + 1, time.perf_counter() - started)
    return curves


def _curve(solution: Solution, offers: Sequence[Offer]) -> Curve:
    return Curve(solution.total, tuple(offers), tuple(solution.loss(offer.choice) for offer in offers), solution.preferred)


def _read(file: Path) -> dict[str, Curve]:
    if not file.is_file():
        return {}
    return {
        name: Curve(
            entry["total"],
            tuple(Offer(Choice(**choice), nbytes) for choice, nbytes in entry["offers"]),
            tuple(entry["losses"]),
            None if entry["preferred"] is None else Choice(**entry["preferred"]),
        )
        for name, entry in json.loads(file.read_text()).items()
    }


def _write(file: Path, curves: Mapping[str, Curve]) -> None:
    def plain(choice: Choice) -> dict[str, int]:
        return {key: value for key, value in vars(choice).items() if value is not None}

    content = {
        name: {
            "total": curve.total,
            "offers": [(plain(offer.choice), offer.nbytes) for offer in curve.offers],
            "losses": curve.losses,
            "preferred": None if curve.preferred is None else plain(curve.preferred),
        }
        for name, curve in curves.items()
    }
    partial = file.with_name(file.name + ".lrc-partial")
    partial.write_text(json.dumps(content))
    os.replace(partial, file)
