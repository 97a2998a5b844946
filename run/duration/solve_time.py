"""How long solving takes: units of the plan's shapes are solved on random numbers, smaller ones where theirs would take long.

The units of a layer that share statistics are solved together, as in a run. Each kind of them is measured once, at growing
fractions of its width; beyond the last fraction its time grows with a power of the width (`_power`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ...calibrate.stats import wanted
from ...compress.base import GroupStats, Method, Solution, TargetStats
from ...compress.options import Option
from ...errors import LrcError
from ...model.targets import Target
from ...plan.plan import Planned
from ...plan.units import Unit, options_of, sharing_inputs
from ..losses.curves import measured_curve, thinned
from ..losses.probe import probed
from ..solve import Together, forms_at, solve_unit
from .clock import Stopwatch, typical
from .eigen_time import Eigenproblems, ReadingTime

_NARROW = 192  # the longest side of the first, narrowest problem
_BUDGET, _FEW = 8.0, 4  # times the budget of one measurement for all kinds together, and the fewest kinds that share it
_ROUND = 64  # widths are multiples of this, because groups and blocks are


@dataclass(frozen=True)
class SolveTime:
    """Seconds for all units of the plan together.

    Args:
        solve: to solve each once and make its chosen form.
        losses: to solve each once and compute the losses of its options, and the forms that are probed.
        share: smallest fraction of the width that was measured; 1: every problem at its full size.
        unknown: what cannot be foretold, and why.
    """

    solve: float = 0.0
    losses: float = 0.0
    share: float = 1.0
    unknown: tuple[str, ...] = ()


def time_solving(plan: Planned, watch: Stopwatch) -> SolveTime:
    """Measure one problem of each kind, and count how often the plan has it."""
    kinds = Counter(_Kind.of(units, plan) for units in jobs(plan))
    watch = replace(watch, budget=_BUDGET * watch.budget / max(_FEW, len(kinds)))
    found, reading = SolveTime(), ReadingTime(watch)
    for kind, count in kinds.items():
        try:
            solve, losses, share = _Problem(plan, kind).seconds(watch, reading)
        except LrcError as error:
            found = replace(found, unknown=(*found.unknown, f"solving {kind.units[0].name}: {error.what}"))
            continue
        found = replace(
            found,
            solve=found.solve + count * solve,
            losses=found.losses + count * losses,
            share=min(found.share, share),
        )
    return found


def _power(method: Method) -> int:
    """With which power of the width the time of a method grows."""
    parts = method.alternatives or method.steps
    return max(map(_power, parts)) if parts else method.power


def jobs(plan: Planned) -> list[list[Unit]]:
    """Units that share statistics, which are prepared once for all of them; those that stay dense are left out."""
    dense = {step.target.name for step in plan.steps if step.choice.dense}
    left = (unit.without(dense) if plan.recipe.allocation == "uniform" else unit for unit in plan.units)
    return sharing_inputs(unit for unit in left if unit.targets)


@dataclass(frozen=True)
class _Kind:
    """A problem of the plan; two are equal where they take the same time.

    Args:
        shapes: of each unit's targets, with their groups by number, and the fraction of the bytes that is kept.
        units: one example.
    """

    shapes: tuple[object, ...]
    units: tuple[Unit, ...]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Kind) and self.shapes == other.shapes

    def __hash__(self) -> int:
        return hash(self.shapes)

    @staticmethod
    def of(units: Sequence[Unit], plan: Planned) -> _Kind:
        """The kind of these units."""
        groups: dict[str, int] = {}
        kept = {step.target.name: round(8 * step.bytes_after / step.bytes_before) for step in plan.steps}
        shapes = tuple(
            (
                unit.slots,
                tuple(
                    (t.out_features, t.in_features, groups.setdefault(t.group, len(groups)), plan.needs[t.name], kept[t.name])
                    for t in unit.targets
                ),
            )
            for unit in units
        )
        return _Kind(shapes, tuple(units))


@dataclass(frozen=True)
class _Spent:
    """Seconds, and the widths of the eigenproblems that were solved in them."""

    seconds: float
    eigenproblems: list[int]


class _Problem:
    """The units of a kind, at any fraction of their width."""

    def __init__(self, plan: Planned, kind: _Kind) -> None:
        self._plan, self._units = plan, kind.units
        self._method, self._settings = plan.recipe.compression
        self._kept = {step.target.name: step.bytes_after / step.bytes_before for step in plan.steps}

    def seconds(self, watch: Stopwatch, reading: ReadingTime) -> tuple[float, float, float]:
        """(seconds to solve and form, seconds to solve and compute losses, fraction of the width that was measured)."""
        longest = max(max(t.out_features, t.in_features) for unit in self._units for t in unit.targets)
        shares = [1.0]
        while shares[0] * longest > _NARROW * 1.5:
            shares.insert(0, shares[0] / 2)
        power = _power(self._method)
        spent: dict[float, list[tuple[_Spent, _Spent]]] = {}

        def once(share: float) -> None:
            spent.setdefault(share, []).append(self._once(share, watch))

        watch.rising(shares, once)
        measured = sorted(spent)[-2:]
        works = [self._work(share) ** (power / 2) for share in measured]

        def at_full_width(part: int) -> float:
            seconds = at_full(works, [typical([call[part].seconds for call in spent[share]]) for share in measured])
            return seconds + reading.beyond_the_cube(spent[measured[-1]][-1][part].eigenproblems, measured[-1])

        return at_full_width(0), at_full_width(1), measured[-1]

    def _work(self, share: float) -> float:
        """The fraction of the targets' numbers that the scaled ones have."""
        scaled = sum(target.numel for unit in self._scaled(share) for target in unit.targets)
        return scaled / sum(target.numel for unit in self._units for target in unit.targets)

    def _once(self, share: float, watch: Stopwatch) -> tuple[_Spent, _Spent]:
        """What solving takes, and what the losses take."""
        units = self._scaled(share)
        element, recipe = self._plan.dtype.itemsize, self._plan.recipe
        options = options_of(units, self._method, self._settings, recipe.rank_multiple, element)
        weights = {t.name: _random(t.out_features, t.in_features, watch.device) for unit in units for t in unit.targets}
        statistics = self._statistics(units, share, watch.device)
        solve = losses = 0.0
        solving, measuring = Eigenproblems(), Eigenproblems()
        for unit in units:
            own = self._options(options[unit.name])
            mine = [weights[t.name].to(self._plan.dtype) for t in unit.targets]
            with solving:
                solve += watch.seconds(partial(self._form, unit, mine, [statistics[t.name] for t in unit.targets], own))
        if recipe.allocation != "uniform":
            for unit in units:
                statistics = self._statistics([unit], share, watch.device)  # read for each unit: nothing is shared
                own = self._options(options[unit.name])
                mine = [weights[t.name].to(self._plan.dtype) for t in unit.targets]
                with measuring:
                    losses += watch.seconds(partial(self._measure, unit, mine, [statistics[t.name] for t in unit.targets], own))
        return _Spent(solve, solving.widths), _Spent(losses, measuring.widths)

    def _options(self, options: Sequence[Option]) -> Sequence[Option]:
        return options if self._plan.recipe.allocation in ("uniform", "own") else thinned(options)

    def _solution(
        self, unit: Unit, weights: list[Tensor], statistics: list[TargetStats], options: Sequence[Option]
    ) -> Solution:
        solutions = solve_unit(self._method, self._settings, unit, weights, statistics)
        return solutions[0] if unit.slots is None else Together.of(solutions, options)

    def _form(self, unit: Unit, weights: list[Tensor], statistics: list[TargetStats], options: Sequence[Option]) -> None:
        solution = self._solution(unit, weights, statistics, options)
        if not options:
            return
        dense = self._plan.dense_bytes(unit)
        kept = sum(self._kept[t.name] * t.numel for t in unit.targets) / sum(t.numel for t in unit.targets)
        chosen = min(options, key=lambda option: abs(option.nbytes - kept * dense))
        for form in forms_at(unit, solution, chosen.choice).values():
            form.stored(self._plan.dtype)
        if solution.total > 0 and not chosen.choice.dense:  # the error that a run records
            solution.loss(chosen.choice)

    def _measure(self, unit: Unit, weights: list[Tensor], statistics: list[TargetStats], options: Sequence[Option]) -> None:
        solution = self._solution(unit, weights, statistics, options)
        dense = self._plan.dense_bytes(unit)
        if not options:
            return
        measured_curve(solution, options, self._method, dense)
        if self._plan.recipe.allocation == "kl":
            for index in probed(options, dense):
                forms_at(unit, solution, options[index].choice)

    def _scaled(self, share: float) -> list[Unit]:
        def side(width: int) -> int:
            return width if share == 1 else min(width, max(_ROUND, round(width * share / _ROUND) * _ROUND))

        def target(each: Target) -> Target:
            return replace(each, out_features=side(each.out_features), in_features=side(each.in_features))

        return [replace(unit, targets=tuple(map(target, unit.targets))) for unit in self._units]

    def _statistics(self, units: Sequence[Unit], share: float, device: torch.device) -> dict[str, TargetStats]:
        """Statistics of random inputs, as many tokens for the width as the calibration set has."""
        targets = [target for unit in units for target in unit.targets]
        what = wanted(targets, self._plan.needs)
        calibration = self._plan.recipe.calibration
        tokens = max(1, round(calibration.samples * calibration.length * share))
        groups: dict[str, GroupStats] = {}
        found: dict[str, TargetStats] = {}
        for target in targets:
            out, inside, needs = target.out_features, target.in_features, self._plan.needs[target.name]
            names = what.inputs[target.group]
            if target.group not in groups:
                vectors = {name: _random(inside, 1, device)[:, 0].abs() for name in sorted(names - {"gram"})}
                gram = _gram(inside, tokens, device) if "gram" in names else None
                groups[target.group] = GroupStats(calibration.samples * calibration.length, gram, **vectors)
            found[target.name] = TargetStats(
                groups[target.group],
                _gram(out, tokens, device) if target.name in what.outputs else None,
                _gram(out, tokens, device) if "grad_gram" in needs else None,
                _random(inside, 1, device)[:, 0].square() if "fisher_in" in needs else None,
                _random(out, inside, device) if "weight_grad" in needs else None,
            )
        return found


def at_full(works: Sequence[float], seconds: Sequence[float]) -> float:
    """Seconds at work 1, on the line through the last two works; in proportion to the last one where that is less.

    A narrow problem takes some time whatever its width is, which does not grow.
    """
    in_proportion = seconds[-1] / works[-1]
    if works[-1] >= 1 or len(works) < 2 or works[-1] <= works[-2] or seconds[-1] <= seconds[-2]:
        return in_proportion
    slope = (seconds[-1] - seconds[-2]) / (works[-1] - works[-2])
    return min(in_proportion, seconds[-1] + slope * (1 - works[-1]))


def _random(rows: int, columns: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(rows + 65537 * columns)
    return torch.randn(rows, columns, generator=generator).to(device)


def _gram(width: int, tokens: int, device: torch.device) -> Tensor:
    x = _random(min(tokens, 2 * width), width, device)
    return x.T @ x / len(x)
