"""Statistics of the original model, collected on disk before the budget is allocated.

One pass over the calibration tokens writes them into a `StatsStore`, layer by layer; an interrupted collection resumes at the
layer that it had reached. `run/losses/curves.py` computes losses from them.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..compress.base import BACKWARD_NEEDS, FORWARD_NEEDS, NOTHING_SEEN, TargetStats
from ..errors import OutputError
from ..model.events import Event, Notify, silent
from ..model.lockstep import Call
from ..model.machine.host_memory import steady_memory
from ..model.machine.precision import full_precision
from ..model.targets import Target
from ..model.view import ModelView
from .backward import GradientPass, collect_gradients
from .data import Calibration
from .gradients import GradientSettings
from .layerwise import TOKENS_PER_BATCH, run_batches, run_in_chunks, through_layers
from .stats import chunks_of, wanted
from .store import MANIFEST, StatsStore, manifest_of


@dataclass(frozen=True)
class Statistics:
    """Statistics of the original model on disk: those of activations and, where a method needs them, of gradients."""

    forward: StatsStore
    backward: StatsStore | None = None

    @property
    def folder(self) -> Path:
        return self.forward.folder

    def read(self, layer: str, names: Sequence[str]) -> dict[str, TargetStats]:
        """The statistics of these targets of a layer."""
        return self.with_gradients(layer, self.forward.read(layer, names))

    def with_gradients(self, layer: str, found: dict[str, TargetStats]) -> dict[str, TargetStats]:
        """The given forward statistics, with those of gradients added."""
        if self.backward is None or not found:
            return found
        gradients = self.backward.read(layer, list(found))
        return {
            name: replace(
                stats,
                grad_gram=gradients[name].grad_gram,
                fisher_in=gradients[name].fisher_in,
                weight_grad=gradients[name].weight_grad,
            )
            for name, stats in found.items()
        }


@full_precision
def collect(
    view: ModelView,
    calibration: Calibration,
    needs: Mapping[str, frozenset[str]],
    folder: Path,
    devices: Sequence[torch.device],
    gradients: GradientSettings,
    notify: Notify = silent,
) -> Statistics:
    """Collect statistics of the original model for all targets, on disk; those of the same model and tokens are reused.

    Args:
        needs: target -> its statistics, of `base.NEEDS`; a target that is not named has none.
        folder: of the store; it takes 2 bytes per entry of every gram (half of a symmetric float32 matrix).
        gradients: settings of the backward pass, where `needs` asks for one.
        notify: is told of each finished layer.
    """
    steady_memory()
    ahead = {target.name: needs.get(target.name, frozenset()) & FORWARD_NEEDS for target in view.targets}
    forward = _forward(view, calibration, ahead, folder, devices, notify)
    back = backward_needs(needs)
    if not back:
        return Statistics(forward)
    return Statistics(forward, collect_backward(view, calibration, back, folder, devices, gradients, notify))


def backward_needs(needs: Mapping[str, frozenset[str]]) -> frozenset[str]:
    """The statistics among any target's needs that take a backward pass."""
    return frozenset[str]().union(*needs.values()) & BACKWARD_NEEDS


@full_precision
def collect_backward(
    view: ModelView,
    calibration: Calibration,
    needs: frozenset[str],
    folder: Path,
    devices: Sequence[torch.device],
    gradients: GradientSettings,
    notify: Notify = silent,
) -> StatsStore:
    """Collect statistics of gradients in a folder inside `folder`, one for each combination of settings.

    An existing collection that holds these needs is reused, whatever recipe made it.
    """
    steady_memory()
    batch = max(1, TOKENS_PER_BATCH // calibration.tokens.shape[1])
    settings = _held_gradients(folder, needs, gradients) or gradients.relevant_to(needs)
    digest = hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:8]
    work = GradientPass(view, calibration.tokens, batch, needs, settings, devices)
    return collect_gradients(work, folder / f"gradients-{settings.labels}-{digest}", notify)


def _held_gradients(folder: Path, needs: frozenset[str], wanted: GradientSettings) -> GradientSettings | None:
    """The settings of a collection in `folder`, finished or not, whose `needs` have the same values."""
    own = wanted.relevant_to(needs)
    for manifest in sorted(folder.glob(f"gradients-*/{MANIFEST}")):
        held = manifest_of(manifest.parent)
        if held is None or "gradients" not in held["identity"]:
            continue
        settings = GradientSettings(**held["identity"]["gradients"])
        there = frozenset[str]().union(*held["needs"].values())
        if settings.relevant_to(needs) == own and needs <= there:
            return settings
    return None


def _forward(
    view: ModelView,
    calibration: Calibration,
    needs: Mapping[str, frozenset[str]],
    folder: Path,
    devices: Sequence[torch.device],
    notify: Notify,
) -> StatsStore:
    identity = {"model": view.fingerprint(), "tokens": calibration.hash, "dtype": str(view.dtype)}
    store = StatsStore(folder, identity, needs)
    if all(store.has(name) for name in view.layer_names):
        return store
    by_layer = targets_by_layer(view)
    missing = sum(
        wanted(targets, store.needs).nbytes(targets, stored=True)
        for name, targets in zip(view.layer_names, by_layer, strict=True)
        if not store.has(name)
    )
    free = shutil.disk_usage(folder).free
    if free < missing:
        raise OutputError(
            f"{folder} has {free / 1e9:,.1f} GB free; the statistics take {missing / 1e9:,.1f} GB.",
            "Free some space, give --statistics a folder on another disk, or use --set allocation=uniform, which keeps none.",
        )
    if not store.kinds:
        with store.alone():
            for name, targets in zip(view.layer_names, by_layer, strict=True):
                store.write(name, {target.name: NOTHING_SEEN for target in targets})
        return store
    batch = max(1, TOKENS_PER_BATCH // calibration.tokens.shape[1])

    def visit(index: int, name: str, layer: nn.Module, calls: Sequence[Call]) -> list[Any] | None:
        """Collect a layer's statistics, unless its file exists."""
        started = time.perf_counter()
        targets = by_layer[index]
        if store.has(name):
            outputs = None if index == len(by_layer) - 1 else run_batches(layer, name, calls, devices)[0]
        else:
            what = wanted(targets, store.needs)
            with store.adding(name) as add:
                outputs = run_in_chunks(layer, name, calls, devices, chunks_of(targets, what.nbytes), what, add)
        notify(Event("statistics", index + 1, len(by_layer), time.perf_counter() - started))
        return outputs

    with store.alone(), torch.no_grad():
        through_layers(view, calibration.tokens.split(batch), visit)
    return store


def targets_by_layer(view: ModelView) -> list[list[Target]]:
    """The targets of each layer, in the order of a forward."""
    found: list[list[Target]] = [[] for _ in view.layers]
    for target in view.targets:
        found[target.layer].append(target)
    return found
