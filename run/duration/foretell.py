"""The prediction: what a plan computes, counted, times what this machine took for a little of each."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ...checkpoint.atomic import writing
from ...compress.base import BACKWARD_NEEDS
from ...model.ablation import together
from ...model.events import Event
from ...model.machine.host_memory import give_back, steady_memory
from ...model.machine.precision import full_precision
from ...model.view import ModelView
from ...plan.plan import PROBED, Planned
from ...plan.units import Unit
from ..losses.curves import thinned
from ..losses.probe import probe_groups, probed
from .clock import Clock, Stopwatch, wall
from .layer_time import LayerTime, time_head, time_layer, time_probe
from .solve_time import SolveTime, jobs, time_solving

_WRITTEN, _BLOCK = 32 << 20, 1 << 15  # bytes that are written, and hashed, at most, and at once
_TRIALS = 7  # of a search: it bisects 128 ratios
_GRADIENTS = 4  # a layer's forward that writes its input, and one with a graph and its backward pass, in plain forwards
_TRAINING = 3.5  # a step forward and backward with its update, in plain forwards
_CHECK = "perplexity before and after"


@dataclass(frozen=True)
class Duration:
    """Predicted seconds of a run from its start, without reading its text.

    Args:
        parts: part of the run -> seconds.
        by_text: seconds among them that grow with the calibration tokens.
        rough: parts that are counted and not measured on this machine, or bounds.
        unknown: parts that cannot be foretold, and why; they are not in the sum.
        share: smallest fraction of the matrices' width that was measured.
        took: seconds of the measurement.
    """

    parts: Mapping[str, float] = field(default_factory=dict)
    by_text: float = 0.0
    rough: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    share: float = 1.0
    took: float = 0.0

    @property
    def seconds(self) -> float:
        """The sum of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class Foretold(Event):
    """The time of the run was predicted."""

    duration: Duration


@full_precision
def foretell(
    view: ModelView, plan: Planned, out: Path, devices: Sequence[torch.device], clock: Clock = wall, checked: bool = True
) -> Duration:
    """Measure this machine for a few seconds, and predict how long a plan takes.

    Args:
        view: a view of the model of its own; the first layer's weights are read and forgotten again.
        out: the folder of the result, or where it will be.
        devices: of the run; the first one is measured, the others are taken to be as fast.
        clock: of the prediction, see `Stopwatch`.
        checked: whether the perplexity before and after is measured at the end.

    Raises:
        LrcError: a layer cannot be read or computed, or the disk not written.
    """
    started = time.perf_counter()
    steady_memory()
    watch = Stopwatch(clock, devices[0])
    layer = time_layer(view, plan, watch)
    if checked:
        layer = time_head(view, layer, watch)
    if plan.recipe.allocation == "kl":
        layer = time_probe(view.widened(), layer, watch)
    solving = time_solving(plan, watch)
    write, read = _disk(out, plan.whole_after, watch)
    give_back()
    found = _counted(_Counts(view, plan, len(devices)), layer, solving, (write, read))
    parts = {name: seconds for name, seconds in found.parts.items() if checked or name != _CHECK}
    return replace(found, parts=parts, took=time.perf_counter() - started)


@dataclass(frozen=True)
class _Counts:
    """What a run computes, counted.

    Args:
        view: the model.
        plan: the plan.
        devices: number of devices that share the batches.
    """

    view: ModelView
    plan: Planned
    devices: int

    @property
    def layers(self) -> float:
        """Layers, where the first one counts as one and the others by their size."""
        sizes = [self.view.layer_nbytes(index) for index in range(len(self.view.layers))]
        return sum(sizes) / sizes[0]

    @property
    def solvers(self) -> int:
        """Devices that solve side by side: at most as many as a layer has matrices with inputs of their own."""
        by_layer = Counter(units[0].targets[0].layer for units in jobs(self.plan))
        return min(self.devices, max(by_layer.values(), default=1))

    @property
    def batches(self) -> float:
        """Batches of calibration tokens that one device runs."""
        calibration = self.plan.recipe.calibration
        return calibration.samples / self.plan.batch / self.devices if self.plan.recipe.reads_text else 0.0

    def variants(self) -> tuple[float, float, float]:
        """Of the probes: (layers that variants run through, variants, passes over the weights)."""
        plan, layers = self.plan, len(self.view.layers)
        by_layer: dict[int, list[Unit]] = {}
        for unit in plan.units:
            by_layer.setdefault(unit.targets[0].layer, []).append(unit)
        groups = [group for units in by_layer.values() for group in probe_groups(units)]
        sizes = [len(probed(thinned(plan.options[g.units[0].name]), plan.dense_bytes(g.units[0]))) for g in groups]
        ids = torch.zeros(PROBED[0], min(PROBED[1], plan.recipe.calibration.length), dtype=torch.int64)
        passes = math.ceil(sum(sizes) / max(1, together(self.view, ids) - 1))
        through = sum(size * (layers - group.layer) for size, group in zip(sizes, groups, strict=True)) + passes * layers
        return through, sum(sizes) + passes, passes


def _counted(counts: _Counts, layer: LayerTime, solving: SolveTime, disk: tuple[float, float]) -> Duration:
    """All parts of a run."""
    plan, layers, batches = counts.plan, counts.layers, counts.batches
    write, read = disk
    recipe = plan.recipe
    statistics = layers * (layer.load + batches * layer.observed + layer.mirror)
    forward = layers * batches * layer.plain
    kept = plan.whole_after / plan.whole_bytes
    parts = {"reading the model once for its hash": plan.unread * read}
    text = 0.0
    if recipe.reads_text and plan.collects:
        stored = sum(nbytes for kind, nbytes in plan.scratch.items() if kind.startswith("statistics"))
        if any(each - BACKWARD_NEEDS for each in plan.needs_ahead.values()):
            parts["statistics"] = statistics + stored * (write + read)
            text += layers * batches * layer.observed
        if any(kind == "statistics of gradients" for kind in plan.scratch):
            collecting = layers * batches * max(0.0, layer.observed - layer.plain)
            parts["gradients"] = 2 * layers * layer.load + _GRADIENTS * forward + collecting
            text += _GRADIENTS * forward
    if recipe.allocation != "uniform":
        parts["losses of the options"] = solving.losses / counts.solvers + layers * layer.load
    if recipe.allocation == "kl":
        through, variants, passes = counts.variants()
        parts["probes"] = through * layer.probe + variants * layer.compared + passes * layers * layer.load
    again = recipe.reads_text and (not plan.collects or recipe.propagate == "compressed")
    if again and not recipe.compresses_nothing:
        parts["forward with statistics"] = statistics
        text += layers * batches * layer.observed
    if recipe.reads_text and recipe.propagate == "compressed":
        parts["forward of the compressed layers"] = forward
        text += forward
    parts["solving"] = solving.solve / counts.solvers + (0.0 if again else layers * layer.load)
    parts |= _training(counts, layer)
    # written, hashed, merged into shards, and read once to be checked
    parts["writing and checking"] = plan.whole_after * (2 * (write + read)) + layers * layer.load * kept
    parts[_CHECK] = layers * layer.load * (1 + kept) + 2 * 1024 * (layers * layer.per_token + layer.head)
    rough = tuple(name for name in ("gradients", *_TRAINED) if name in parts)
    if recipe.max_ppl_increase is not None:
        trial = parts["solving"] + parts["writing and checking"] + parts.get("forward of the compressed layers", 0.0)
        parts["trials of the search"] = _TRIALS * (trial + layers * layer.load * kept)
        rough = (*rough, "trials of the search")
    return Duration(
        {name: seconds for name, seconds in parts.items() if seconds > 0}, text, rough, _unknown(plan) + solving.unknown,
        solving.share,
    )  # fmt: skip


_TRAINED = ("training of the layers, at most", "training end to end, at most")


def _training(counts: _Counts, layer: LayerTime) -> dict[str, float]:
    """Seconds of training, where the recipe trains to the last epoch or step."""
    refine, calibration = counts.plan.recipe.refine, counts.plan.recipe.calibration
    found: dict[str, float] = {}
    if refine is None:
        return found
    tokens = calibration.samples * calibration.length
    held = calibration.held_out * calibration.length
    if refine.block is not None:
        epoch = min(refine.block.epoch_tokens or tokens, tokens)
        each = _TRAINING * epoch + held
        found[_TRAINED[0]] = counts.layers * layer.per_token * (refine.block.epochs * each + 2 * (tokens + held))
    if refine.end_to_end is not None:
        settings = refine.end_to_end
        passes = _TRAINING + (1 if settings.gradient_checkpointing else 0)
        looks = 1 + -(-settings.steps // settings.every)
        work = passes * settings.steps * settings.batch_tokens + looks * held + tokens + held
        found[_TRAINED[1]] = counts.layers * layer.per_token * work
    return found


def _unknown(plan: Planned) -> tuple[str, ...]:
    recipe = plan.recipe
    found = []
    if recipe.reads_text and recipe.calibration.self_written(recipe.calibration.samples):
        found.append("the calibration text that the model itself writes")
    if recipe.dropping is not None:
        repair = "" if recipe.dropping.repair == "none" else f", and the repair {recipe.dropping.repair}"
        found.append(f"choosing what to drop by the score {recipe.dropping.score}{repair}")
    return tuple(found)


def _disk(out: Path, nbytes: int, watch: Stopwatch) -> tuple[float, float]:
    """Seconds to write a byte near `out` for good, and to hash one; measured on `nbytes` at most, where the disk has room."""
    standing = next(path for path in (out, *out.absolute().parents) if path.is_dir())
    blocks = max(1, min(_WRITTEN, nbytes, shutil.disk_usage(standing).free // 16) // _BLOCK)
    block = os.urandom(_BLOCK)

    def write() -> None:
        with tempfile.TemporaryFile(dir=standing) as file:
            for _ in range(blocks):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())

    def digest() -> None:
        found = hashlib.sha256()
        for _ in range(blocks):
            found.update(block)

    with writing(standing):
        written = watch.seconds(write)
    return written / (blocks * _BLOCK), watch.seconds(digest) / (blocks * _BLOCK)
