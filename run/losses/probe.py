"""Probes: the effect of compressing a single target on the model's predictions, measured in nats.

Output errors of different targets have no common scale. Probes give them one: a few tokens run through the original model and
through variants of it, in each of which one target alone is compressed. The Kullback-Leibler divergence of a variant's
predictions from the original's is the loss of that form in nats per token. A variant shares the computation of all layers
before its target with the original; all variants of a pass run layer by layer together, so that a layer's weights are read once
for as many variants as fit in memory. Two probes per target, at a small and a medium size, show how its divergence grows with
its output error; the power law through them predicts the other sizes.

Probes run in float32 whatever the checkpoint's dtype is: rounding in 16 bits changes predictions too, and would be attributed
to the target (docs/LOG.md has the cost).

Source: LEMS (ICML 2026, OpenReview IjIgNPFuCt) rescales each matrix' spectrum by its divergence at one reference rank; the
second point and the power law are lrc's (docs/LOG.md has their gain).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ...compress.base import Curve, Solution
from ...compress.forms.base import Form, Spec, build_module, fill_module
from ...compress.forms.shared import link
from ...compress.options import Option, at_shares, at_sizes, coarsest
from ...model.ablation import scored, together
from ...model.divergence import Predictions
from ...model.layer_forms import target_weight
from ...model.layerwise import LayerTurn, layerwise
from ...model.lockstep import on_host, run_calls, run_layer
from ...model.targets import Target
from ...model.view import ModelView
from ...plan.plan import PROBES_EACH
from ...plan.units import Unit
from ..solve import forms_at

SIZES = (0.3, 0.6)  # fractions of the dense bytes at which targets are probed
SHARES = (0.5, 0.85)  # of the largest form, where that is smaller
_STEEPEST, _FLATTEST = 2.0, 0.3  # exponents that two noisy points may give
_LEAST = 1e-7  # nats; below this a divergence is rounding


@dataclass(frozen=True)
class ProbeGroup:
    """Units that are probed together: a single unit, or the units of all experts of a layer."""

    units: tuple[Unit, ...]

    @property
    def layer(self) -> int:
        """The first layer that compressing the group changes."""
        return min(target.layer for unit in self.units for target in unit.targets)

    @property
    def name(self) -> str:
        return f"{self.units[0].targets[0].layer}.{self.units[0].targets[0].role}"


def probe_groups(units: Sequence[Unit]) -> list[ProbeGroup]:
    """The groups of one layer's units."""
    roles: dict[str, list[Unit]] = {}
    for unit in units:
        roles.setdefault(unit.targets[0].role, []).append(unit)
    return [ProbeGroup(tuple(members)) for members in roles.values()]


def by_alternative(options: Sequence[Option]) -> dict[int | None, list[int]]:
    """Alternative -> indices of its options; None -> all options, where the recipe has no alternatives."""
    found: dict[int | None, list[int]] = {}
    for index, option in enumerate(options):
        found.setdefault(option.choice.alternative, []).append(index)
    return found


def probed(options: Sequence[Option], dense: int) -> list[int]:
    """Indices of the options to probe, ascending: each alternative's at `SIZES`, or the coarsest where only bits differ.

    Of an alternative whose largest option is smaller than that, those at `SHARES` of its largest option.
    """
    found: list[int] = []
    for indices in by_alternative(options).values():
        own = [options[index] for index in indices]
        in_bits = all(option.choice.bits is not None for option in own) and len({option.choice.rank for option in own}) == 1
        small = own[-1].nbytes < max(SIZES) * dense
        choose = coarsest(PROBES_EACH) if in_bits else at_shares(*SHARES) if small else at_sizes(*SIZES)
        found += [indices[index] for index in choose(own, dense)]
    return sorted(found)


def _passes(groups: Sequence[ProbeGroup], sizes: Sequence[int], most: int) -> list[list[ProbeGroup]]:
    """Neighbouring groups together, while the sum of their sizes is at most `most`; at least one group in each pass."""
    passes: list[list[ProbeGroup]] = []
    room = 0
    for group, size in zip(groups, sizes, strict=True):
        if not passes or size > room:
            passes.append([])
            room = most
        passes[-1].append(group)
        room -= size
    return passes


SolveUnits = Callable[[nn.Module, str, Sequence[Unit]], Mapping[str, Solution]]
Probe = tuple[ProbeGroup, int]  # a variant: (the group that is compressed in it, index of the option)


class Probing:
    """The tokens and variants of one probing run; see `run`.

    Args:
        view: the model; forms are rounded to its dtype, as they would be stored.
        tokens: (samples, length) token ids; a few hundred in all are enough.
        units: the units to probe, by layer; a unit of several layers belongs to the layer of its first target.
        options: unit name -> its options.
        dense: unit name -> its bytes when dense.
    """

    def __init__(
        self,
        view: ModelView,
        tokens: Tensor,
        units: Sequence[Sequence[Unit]],
        options: Mapping[str, Sequence[Option]],
        dense: Mapping[str, int],
    ) -> None:
        self._view, self._stored = view.widened(), view.dtype
        self._tokens, self._options, self._dense = tokens, options, dense
        self._scored, self._only = scored(self._view.model, tokens)
        found = [group for layer in units for group in probe_groups(layer)]
        self._passes = _passes(found, [len(self._probed(group)) for group in found], together(self._view, tokens) - 1)
        self._later: dict[tuple[str, int], dict[Target, Form]] = {}  # forms of a variant's targets in layers still to come

    def _probed(self, group: ProbeGroup) -> list[int]:
        first = group.units[0].name
        return probed(self._options[first], self._dense[first])

    @torch.no_grad()
    def run(
        self, solve: SolveUnits, device: torch.device, notify: Callable[[int], None] = lambda layer: None
    ) -> dict[str, dict[int, float]]:
        """Name of a probe group -> {option index: divergence in nats per token}.

        Args:
            solve: (layer, its name, units) -> unit name -> its solution.
            device: where layers run.
            notify: called with the number of layers done; with several passes, with their mean over all passes.
        """
        found: dict[str, dict[int, float]] = {}
        count, layers = len(self._passes), len(self._view.layers)
        for number, groups in enumerate(self._passes):
            probes = [(group, option) for group in groups for option in self._probed(group)]

            def share(done: int, before: int = number * layers) -> None:
                notify((before + done) // count)

            found |= self._pass(probes, solve, device, share)
        return found

    def _pass(
        self, probes: Sequence[Probe], solve: SolveUnits, device: torch.device, notify: Callable[[int], None]
    ) -> dict[str, dict[int, float]]:
        """One pass over the weights, with the original and a variant per probe."""
        with layerwise(self._view, [self._tokens] * (1 + len(probes)), self._only) as forward:
            for turn in forward:
                with turn.loaded(device) as layer:
                    turn.answer(self._outputs(turn, layer, probes, solve, device))
                notify(turn.index + 1)
            return self._divergences(probes, forward.results())

    def _outputs(
        self, turn: LayerTurn, layer: nn.Module, probes: Sequence[Probe], solve: SolveUnits, device: torch.device
    ) -> list[Any]:
        """The outputs of a layer in the original model and in every variant."""
        index, name = turn.index, turn.name
        (original,) = run_calls(layer, name, turn.calls[:1], device)
        outputs: list[Any] = [original] * len(turn.calls)
        here_first = dict.fromkeys(unit for group, _ in probes if group.layer == index for unit in group.units)
        solutions = solve(layer, name, list(here_first))
        for number, (group, option) in enumerate(probes, 1):
            if group.layer > index:
                break  # the remaining variants do not differ from the original yet
            forms = self._later.pop((group.name, option), {})
            for unit in group.units if group.layer == index else ():
                forms |= forms_at(unit, solutions[unit.name], self._options[unit.name][option].choice)
            here = {target: form for target, form in forms.items() if target.layer == index}
            if len(here) < len(forms):
                self._later[group.name, option] = {t: form.stored(self._stored) for t, form in forms.items() if t.layer > index}
            with _in_place_of(layer, name, here, self._stored):
                outputs[number] = on_host(run_layer(layer, turn.calls[number].to(device)))
        return outputs

    def _divergences(self, probes: Sequence[Probe], results: Iterator[Any]) -> dict[str, dict[int, float]]:
        original = Predictions(next(results).logits[:, -self._scored :])
        found: dict[str, dict[int, float]] = {}
        for (group, option), result in zip(probes, results, strict=True):
            nats = original.divergence(result.logits[:, -self._scored :]) / len(original)
            found.setdefault(group.name, {})[option] = max(nats, _LEAST)
        return found


@contextmanager
def _in_place_of(layer: nn.Module, name: str, forms: Mapping[Target, Form], dtype: torch.dtype) -> Iterator[None]:
    """While the context is open, the layer multiplies by these forms, rounded to `dtype` and held in the layer's dtype."""
    undo: list[Callable[[], object]] = []
    specs: dict[str, Spec] = {}
    modules = {target.module for target in forms}
    for target, form in forms.items():
        weight, bias = target_weight(layer, name, target)
        stored = form.with_bias(bias).stored(dtype).stored(weight.dtype)
        # an expert has no module of its own, and a factor that is shared with another layer is not in memory
        if target.expert is not None or stored.spec().get("owner", target.module) not in modules:
            kept = weight.clone()
            weight.copy_(stored.dense())
            undo.append(partial(weight.copy_, kept))
            continue
        specs[target.module] = stored.spec()
        path, _, leaf = target.module.removeprefix(name + ".").rpartition(".")
        parent = layer.get_submodule(path)
        with torch.device("meta"):
            empty = build_module(specs[target.module], target.in_features, target.out_features)
        module = getattr(parent, leaf)
        setattr(parent, leaf, fill_module(empty, stored.tensors()).to(weight.device))
        undo.append(partial(setattr, parent, leaf, module))
    link(specs, lambda path: layer.get_submodule(path.removeprefix(name + ".")))
    try:
        yield
    finally:
        for put_back in undo:
            put_back()


def scaled(curves: Mapping[str, Curve], points: Mapping[int, float]) -> dict[str, Curve]:
    """The curves of one group with losses in nats per token.

    Args:
        curves: unit name -> its curve, with losses in the method's own metric.
        points: option index -> the group's measured divergence. The losses of a single unit follow the power laws through
            neighbouring points of each alternative; several units share the divergence of the smallest probed option in
            proportion to their losses.
    """
    found = {}
    for name, curve in curves.items():
        losses, totals = [0.0] * len(curve.losses), []
        for indices in by_alternative(curve.options).values():
            law = _law(name, curves, {index: points[index] for index in indices if index in points})
            totals.append(law(curve.total))
            for index in indices:
                losses[index] = law(curve.losses[index])
        found[name] = replace(curve, total=max(totals, default=0.0), losses=tuple(losses))
    return found


def _law(name: str, curves: Mapping[str, Curve], points: Mapping[int, float]) -> Callable[[float], float]:
    """A function from a loss in the method's own metric to nats, for one unit, from the probes of one alternative."""
    curve = curves[name]
    known = [(curve.losses[i], divergence) for i, divergence in sorted(points.items()) if curve.losses[i] > 0]
    if not known:  # even the smallest probed option has no loss
        return lambda loss: 0.0
    if len(curves) > 1:
        loss, divergence = known[0]
        known = [(loss, divergence * loss / sum(each.losses[min(points)] for each in curves.values()))]
    known = [known[0], *(after for before, after in pairwise(known) if after[0] < before[0])]

    def nats(loss: float) -> float:
        """Along the power law through the two neighbouring points, descending; one point alone: in proportion."""
        after = next((i for i, (each, _) in enumerate(known) if each <= loss), len(known) - 1)
        (high, most), (low, less) = known[max(after - 1, 0)], known[min(max(after, 1), len(known) - 1)]
        power = 1.0
        if low < high:
            power = min(max(math.log(most / less) / math.log(high / low), _FLATTEST), _STEEPEST)
        at, nats = (low, less) if loss < low else (high, most)
        return nats * (max(loss, 0.0) / at) ** power

    return nats
