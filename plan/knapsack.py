"""The multiple-choice knapsack: options with bytes and predicted loss in, one option per unit out.

`uniform` lets every unit keep the same fraction of its bytes, like the one-shot results of the papers. `solve` weighs units
against each other: one multiple-choice knapsack for the whole model, in bytes. A greedy algorithm solves its linear relaxation
exactly: it takes the steps along the convex hulls of all units in the order of loss saved per byte. This gives a lower bound,
a price per byte, and a solution close to the bound. Options whose reduced cost at that price exceeds the gap cannot be part of
a better solution. The integer program over the remaining options (HiGHS) is therefore small, and its solution is exact.

Sources: rank = ⌊kept · out · in / (out + in)⌋ from each target's own shape: SVD-LLM, arXiv 2403.07378 (its code uses one rank
for q, k, v and o, which is wrong if k and v are narrower). The relaxation: Sinha and Zoltners, Operations Research 27
(1979); reduced-cost fixing: Pisinger, European Journal of Operational Research 83 (1995).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..compress.options import Choice, Option
from ..errors import BudgetError
from .budget import ASK, checked_ratio


@dataclass(frozen=True)
class PredictedOption:
    """An option of a unit with its predicted loss."""

    choice: Choice
    nbytes: int
    loss: float


def require_ratio(ratio: float) -> None:
    """Refuse a ratio outside [0, 1)."""
    try:
        checked_ratio(ratio)
    except ValueError as error:
        raise BudgetError(f"The ratio {error} (got {ratio:g})") from None


def uniform(
    options: Mapping[str, tuple[int, Sequence[Option]]], ratio: float | None, asked: str | None = None
) -> dict[str, Option]:
    """Give every unit its largest option within 1 - ratio of its dense bytes; a unit without options stays dense.

    Args:
        options: unit -> (its dense bytes, its options, ascending in bytes).
        ratio: fraction of the bytes to remove, 0 <= ratio < 1; 0 leaves every unit dense. None takes the only option of
            methods whose settings fix the size, or dense if that option saves no bytes.
        asked: the user's request in words, for the error message; the ratio by default.

    Returns:
        unit -> its option; a dense one has an empty `Choice` and the dense bytes.

    Raises:
        BudgetError: the ratio is out of range or missing, or a unit has options but none that is small enough.
    """
    if ratio is not None:
        require_ratio(ratio)
    chosen: dict[str, Option] = {}
    starved: list[str] = []
    most = min((1 - own[0].nbytes / dense for dense, own in options.values() if own), default=0.0)
    for name, (dense, own) in options.items():
        if ratio is None:
            if len(own) > 1:
                raise BudgetError("How much should go? The recipe names no ratio.", ASK)
            chosen[name] = own[0] if own and own[0].nbytes < dense else Option(Choice(), dense)
            continue
        # guards against 0.6 * 100 = 59.99999: a rank must not depend on how a decimal is rounded
        allowed = int((1 - ratio) * dense + 1e-6)
        fitting = [option for option in own if option.nbytes <= allowed]
        if ratio == 0 or not own:
            chosen[name] = Option(Choice(), dense)
        elif fitting:
            chosen[name] = fitting[-1]
        else:
            starved.append(f"{name} ({dense:,} bytes)")
    if starved:
        raise BudgetError(
            f"At {asked or f'ratio {ratio:g}'}, {len(starved)} targets have no form that is small enough, {starved[0]} first.",
            f"Remove less (a ratio up to {math.floor(1000 * most) / 1000:g} can be reached), lower rank_multiple or the "
            "method's rank or bits, or keep those targets dense (keep: [PATTERN] in the recipe).",
        )
    return chosen


@dataclass(frozen=True)
class Solved:
    """One option per unit.

    Args:
        options: unit -> its option, in the order in which the units were given.
        nbytes: bytes of all options together.
        loss: sum of their predicted losses.
        bound: lower bound on the predicted loss of any solution within the budget.
        exact: whether the integer program has closed the gap of the relaxation.
    """

    options: dict[str, PredictedOption]
    nbytes: int
    loss: float
    bound: float
    exact: bool

    @property
    def gap(self) -> float:
        """Upper bound on the distance of the loss from the best possible loss, relative to the lower bound."""
        return 0.0 if self.exact else (self.loss - self.bound) / max(self.bound, 1e-300)


def solve(options: Mapping[str, Sequence[PredictedOption]], budget: int, most_nodes: int = 1_000) -> Solved:
    """Choose one option per unit so that the total predicted loss is least within the budget.

    Args:
        options: unit -> its options, the dense form included where the unit may stay dense.
        budget: bytes for all units together.
        most_nodes: limit on the nodes that the integer program searches; not a time limit, so that the result is the same on
            every machine.

    Raises:
        BudgetError: even the smallest options exceed the budget; the message states their bytes.
        ValueError: a unit has no option, or a loss is not finite.
    """
    problem = _Problem({name: _useful(name, each) for name, each in options.items()}, budget)
    if problem.smallest > budget:
        largest = sum(max(option.nbytes for option in each) for each in options.values())
        raise BudgetError(
            f"The budget allows {budget:,} bytes; the smallest forms of all {len(options)} targets come to "
            f"{problem.smallest:,}.",
            f"A ratio up to {math.floor(1000 * (1 - problem.smallest / largest)) / 1000:g} can be reached by this method.",
        )
    indices, price, bound = problem.relaxed()
    indices = problem.filled(indices)
    loss = problem.loss(indices)
    exact = loss <= bound * (1 + 1e-12)
    if not exact:
        better, proven, exact = problem.integer(price, loss, bound, most_nodes)
        if better is not None and (better_loss := problem.loss(better)) < loss:
            indices, loss = better, better_loss
        bound = max(bound, min(proven, loss))
    chosen = {name: problem.options[name][indices[name]] for name in options}
    return Solved(chosen, sum(option.nbytes for option in chosen.values()), loss, bound, exact)


def _useful(name: str, options: Sequence[PredictedOption]) -> list[PredictedOption]:
    """The Pareto-optimal options in bytes and loss, in ascending order of bytes and thus descending order of loss."""
    if not options:
        raise ValueError(f"{name} has no option")
    if bad := [option for option in options if not math.isfinite(option.loss)]:
        raise ValueError(f"{name}: the predicted loss of {bad[0].choice} is not finite")
    kept: list[PredictedOption] = []
    for option in sorted(options, key=lambda option: (option.nbytes, option.loss)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept


Indices = dict[str, int]  # unit -> index of its option


class _Problem:
    """The Pareto-optimal options of every unit, and the budget."""

    def __init__(self, options: Mapping[str, list[PredictedOption]], budget: int) -> None:
        self.options, self._budget = options, budget
        self.smallest = sum(each[0].nbytes for each in options.values())

    def loss(self, indices: Indices) -> float:
        """Total predicted loss of a solution."""
        return math.fsum(self.options[name][index].loss for name, index in indices.items())

    def relaxed(self) -> tuple[Indices, float, float]:
        """Solve the linear relaxation: (the solution without its fractional step, price per byte, lower bound)."""
        steps = []  # along the convex hull of every unit; the slope (loss per byte) is the first sort key
        for name, options in self.options.items():
            for before, after in pairwise(_lower_hull(options)):
                saved = options[before].loss - options[after].loss
                cost = options[after].nbytes - options[before].nbytes
                steps.append((-saved / cost, name, after, saved, cost))
        steps.sort(key=lambda step: step[:3])
        taken = dict.fromkeys(self.options, 0)
        left = self._budget - self.smallest
        loss = math.fsum(options[0].loss for options in self.options.values())
        for slope, name, after, saved, cost in steps:
            if cost > left:
                return taken, -slope, max(0.0, loss + slope * left)
            taken[name], left, loss = after, left - cost, loss - saved
        return taken, 0.0, max(0.0, math.fsum(options[-1].loss for options in self.options.values()))

    def filled(self, indices: Indices) -> Indices:
        """Spend the remaining bytes of the relaxation: repeatedly take the step that lowers the loss most and still fits."""
        found = dict(indices)
        left = self._budget - sum(self.options[name][index].nbytes for name, index in found.items())

        def step(name: str) -> tuple[float, str, int] | None:
            options, index = self.options[name], found[name]
            fitting = [i for i in range(index + 1, len(options)) if options[i].nbytes - options[index].nbytes <= left]
            return (options[fitting[-1]].loss - options[index].loss, name, fitting[-1]) if fitting else None  # losses only fall

        steps = [each for name in found if (each := step(name))]
        heapq.heapify(steps)
        while steps:
            _, name, after = heapq.heappop(steps)
            cost = self.options[name][after].nbytes - self.options[name][found[name]].nbytes
            if cost <= left:
                left -= cost
                found[name] = after
            if following := step(name):
                heapq.heappush(steps, following)
        return found

    def integer(self, price: float, loss: float, bound: float, most_nodes: int) -> tuple[Indices | None, float, bool]:
        """Solve the integer program over the options that can be part of a solution better than `loss`.

        The lower bound is the sum over the units of their least priced loss (loss + price · bytes). An option whose priced
        loss exceeds its unit's least one by more than the gap cannot be part of a better solution.

        Args:
            price: loss per byte, from the relaxation.
            loss: predicted loss of the best known solution.
            bound: lower bound, from the relaxation.
            most_nodes: limit on the nodes that the search visits.

        Returns:
            The solution, None if the search found none; a lower bound; and whether the search was complete.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        columns: list[tuple[str, int]] = []  # unit and option
        rows: list[int] = []  # the unit of each column
        most = loss * (1 + 1e-9)
        for row, (name, options) in enumerate(self.options.items()):
            priced = [option.loss + price * option.nbytes for option in options]
            open_ = [index for index, each in enumerate(priced) if bound + each - min(priced) <= most]
            columns += [(name, index) for index in open_]
            rows += [row] * len(open_)
        chosen = [self.options[name][index] for name, index in columns]
        costs = np.array([option.nbytes for option in chosen], dtype=np.int64)
        grain = math.gcd(*(int(cost) for cost in costs)) or 1  # small integers keep the solver's tolerance below one byte
        one_each = csr_array((np.ones(len(rows)), (rows, range(len(rows)))), shape=(len(self.options), len(columns)))
        result = milp(
            np.array([option.loss for option in chosen]) / max(loss, 1e-300),
            integrality=np.ones(len(columns)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint((costs // grain)[None].astype(float), 0, self._budget // grain),
            ],
            options={"node_limit": most_nodes, "mip_rel_gap": 1e-9},
        )
        dual = result.mip_dual_bound
        proven = bound if dual is None or not math.isfinite(dual) else dual * loss
        if result.x is None:
            return None, proven, False
        found = dict(columns[i] for i in np.flatnonzero(result.x > 0.5))
        within = sum(self.options[name][index].nbytes for name, index in found.items()) <= self._budget
        return (found, proven, result.status == 0) if len(found) == len(self.options) and within else (None, bound, False)


def _lower_hull(options: Sequence[PredictedOption]) -> list[int]:
    """Indices of the lower convex hull of (bytes, loss)."""
    hull: list[int] = []
    for index, option in enumerate(options):
        while len(hull) > 1:
            a, b = options[hull[-2]], options[hull[-1]]
            if (a.loss - b.loss) * (option.nbytes - a.nbytes) > (a.loss - option.loss) * (b.nbytes - a.nbytes):
                break
            hull.pop()
        hull.append(index)
    return hull
