"""The loss of every option of every unit, measured before the budget is allocated.

Each unit is solved once, from statistics on disk; the losses of its options are its curve. Curves are small and are kept with
the statistics. An interrupted measurement therefore continues where it stopped, and a run at another ratio needs no
measurement.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from ...calibrate.collect import Statistics
from ...checkpoint.atomic import read_json, write_json
from ...compress.base import BACKWARD_NEEDS, FORWARD_NEEDS, Curve, Method, Solution
from ...compress.options import Option
from ...model.events import Event
from ...model.machine.host_memory import give_back
from ...model.machine.workers import on_devices
from ...plan.plan import PROBED, Draft
from ...plan.units import Unit
from ..run import Run
from ..solve import Gathering, Together, solve_unit
from .importance_scores import layer_angles, of_target
from .probe import Probing, by_alternative, probe_groups, scaled

Found = TypeVar("Found")

_VERSION = 2  # of the measurement: curves on disk with another version are not used
MOST_OPTIONS = 64  # per alternative; more would change an allocation by less than the error of the predicted losses


def thinned(options: Sequence[Option], most: int = MOST_OPTIONS) -> list[Option]:
    """At most `most` options of each alternative, evenly spaced, with the smallest and the largest."""
    kept: set[int] = set()
    for indices in by_alternative(options).values():
        count = min(most, len(indices))
        kept |= {indices[round(i * (len(indices) - 1) / max(1, count - 1))] for i in range(count)}
    return [options[index] for index in sorted(kept)]


def measure(draft: Draft, run: Run, statistics: Statistics) -> dict[str, Curve]:
    """Unit name -> its loss at each of its options with the recipe's method, from statistics on disk.

    If the allocation needs losses in nats, they are probed on a few tokens of every source of the calibration set.
    """
    work = _Measuring(draft, run, statistics)
    return work.in_nats() if draft.recipe.allocation == "kl" else work.curves()


class _Measuring:
    """One measurement of all curves; the curves of finished layers are kept with the statistics."""

    def __init__(self, draft: Draft, run: Run, statistics: Statistics) -> None:
        self._run, self._view, self._store = run, run.view, statistics
        recipe = draft.recipe
        self._method, self._settings = recipe.compression
        # without statistics of the forward pass no tokens are counted
        self._by_tokens = recipe.allocation in ("kl", "fisher") and bool(self._method.all_needs & FORWARD_NEEDS)
        self._layers: list[list[Unit]] = [[] for _ in run.view.layers]  # a unit that spans layers is in the first of them
        for unit in draft.units:
            self._layers[unit.targets[0].layer].append(unit)
        self._score = recipe.rule.score if recipe.rule is not None else ""
        exact = recipe.allocation == "own" or self._score != ""  # these use one given size, or every rank
        self._options = dict(draft.options) if exact else {name: thinned(each) for name, each in draft.options.items()}
        self._dense = {unit.name: draft.dense_bytes(unit) for unit in draft.units}
        self._tag = self._identity(draft, exact)

    def _identity(self, draft: Draft, exact: bool) -> str:
        """A hash of everything that a curve depends on, apart from the statistics."""
        recipe = draft.recipe
        asked = {
            "version": _VERSION,
            "method": self._method.name,
            "settings": self._settings.model_dump(mode="json", serialize_as_any=True),
            "multiple": recipe.rank_multiple,
            "thinned": not exact,
            "probed": recipe.allocation == "kl",
            "gradients": recipe.gradients.model_dump(mode="json") if self._method.needs & BACKWARD_NEEDS else None,
            # which targets are solved together, and which experts are probed together, depends on `keep`
            "units": [
                [target.name for target in unit.targets]
                for unit in draft.units
                if unit.slots is not None or unit.targets[0].expert is not None
            ],
            "score": self._score,
            "by_tokens": self._by_tokens,
            "limits": {pattern: limit.model_dump() for pattern, limit in recipe.limits.items()},
        }
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]

    def curves(self) -> dict[str, Curve]:
        """Losses in the method's own metric, with the importance scores that the recipe's allocation rule uses."""
        found: dict[str, Curve] = {}
        if self._score == "angular":
            self._angles = layer_angles(self._view, self._run.calibration.tokens, self._run.devices[0])
        for index, units in enumerate(self._layers):
            started, name = time.perf_counter(), self._view.layer_names[index]
            held = read_json(self._file(name), dict[str, Curve]) or {}
            if any(unit.name not in held for unit in units):
                layer = self._view.load(name)
                missing = [unit for unit in units if unit.name not in held]
                held |= self._solved(layer, name, missing, partial(self._with_scores, name))
                self._view.unload(name)
                give_back()
                write_json(self._file(name), held)
            found |= {unit.name: held[unit.name] for unit in units}
            self._notify(index + 1, started)
        return found

    def _notify(self, layers: int, started: float) -> None:
        self._run.notify(Event("losses", layers, len(self._view.layers), time.perf_counter() - started))

    def in_nats(self) -> dict[str, Curve]:
        """Losses in nats per token, by probing (run/losses/probe.py); an interrupted measurement starts over."""
        file = self._store.folder / f"nats-{self._tag}.json"
        names = [unit.name for layer in self._layers for unit in layer]  # in one order: the solver's answer may follow it
        if set(names) <= (held := read_json(file, dict[str, Curve]) or {}).keys():
            return {name: held[name] for name in names}
        plain: dict[str, Curve] = {}

        def look(unit: Unit, solution: Solution, reached: int) -> Solution:
            plain[unit.name] = self._curve(unit, solution, reached)
            return solution

        def solve(layer: nn.Module, name: str, units: Sequence[Unit]) -> dict[str, Solution]:
            return self._solved(layer, name, units, look)

        started = time.perf_counter()
        tokens = self._run.calibration.few(*PROBED)
        probing = Probing(self._view, tokens, self._layers, self._options, self._dense)
        divergences = probing.run(solve, self._run.devices[0], lambda layer: self._notify(layer, started))
        found: dict[str, Curve] = {}
        for units in self._layers:
            for group in probe_groups(units):
                found |= scaled({unit.name: plain[unit.name] for unit in group.units}, divergences[group.name])
        write_json(file, found)
        return found

    def _with_scores(self, layer: str, unit: Unit, solution: Solution, reached: int) -> Curve:
        curve = self._curve(unit, solution, reached)
        if not self._score:
            return curve
        (target,) = unit.targets  # recipes permit rules only with methods that solve targets alone
        stats = self._store.read(layer, [target.name])[target.name]
        angle = self._angles[target.layer] if self._score == "angular" else 0.0
        shape = (target.out_features, target.in_features)
        return replace(curve, scores=of_target(self._score, solution, stats, shape, angle))

    def _file(self, layer: str) -> Path:
        return self._store.folder / f"{layer}.curves-{self._tag}.json"

    def _solved(
        self, layer: nn.Module, name: str, units: Sequence[Unit], look: Callable[[Unit, Solution, int], Found]
    ) -> dict[str, Found]:
        """Unit name -> what `look(unit, its solution, number of tokens that reached it)` returns, on all devices."""
        gathering = Gathering(self._view, self._store.read)
        found: dict[str, Found] = {}

        def solve(unit: Unit, device: torch.device) -> None:
            inputs = gathering.inputs(unit, layer, name, device)
            solutions = solve_unit(self._method, self._settings, unit, inputs.weights, inputs.statistics)
            solution = solutions[0] if unit.slots is None else Together.of(solutions, self._options[unit.name])
            # some targets of a unit may have no statistics
            found[unit.name] = look(unit, solution, max(stats.group.tokens for stats in inputs.statistics))

        on_devices(units, self._run.devices, solve)
        return {unit.name: found[unit.name] for unit in units}

    def _curve(self, unit: Unit, solution: Solution, reached: int) -> Curve:
        curve = measured_curve(solution, self._options[unit.name], self._method, self._dense[unit.name])
        if not self._by_tokens or unit.targets[0].expert is None:
            return curve
        share = reached / self._run.calibration.tokens.numel()
        return replace(curve, total=share * curve.total, losses=tuple(share * loss for loss in curve.losses))


def measured_curve(solution: Solution, options: Sequence[Option], method: Method, dense: int) -> Curve:
    """Losses of all options, measured or interpolated between a few measured ones (log loss is almost linear in bytes)."""
    losses = [0.0] * len(options)
    total = solution.total
    for alternative, indices in by_alternative(options).items():
        own = [options[index] for index in indices]
        choose = method.measured_of(alternative)
        known = range(len(own)) if choose is None else choose(own, dense)
        measured = [solution.loss(own[index].choice) for index in known]
        found = measured if choose is None else _between([alternative.nbytes for alternative in own], known, measured, total)
        for index, loss in zip(indices, found, strict=True):
            losses[index] = loss
    return Curve(total, tuple(options), tuple(losses), solution.preferred)


def _between(nbytes: Sequence[int], known: Sequence[int], losses: Sequence[float], total: float) -> list[float]:
    """Losses at all sizes, interpolated or extrapolated from those of the options `known` (indices, ascending)."""
    every, sizes = np.array(nbytes, dtype=float), np.array([nbytes[index] for index in known], dtype=float)
    logs = np.log(np.maximum(losses, max(total * 1e-12, 1e-300)))
    if len(known) > 1:
        segment = np.clip(np.searchsorted(sizes, every) - 1, 0, len(known) - 2)
        slope = (logs[segment + 1] - logs[segment]) / (sizes[segment + 1] - sizes[segment])
        logs = logs[segment] + slope * (every - sizes[segment])
    else:
        logs = np.full(len(every), logs[0])
    return [float(loss) for loss in np.minimum(np.exp(logs), total)]
