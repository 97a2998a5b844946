"""The budget: options with cost and predicted loss in, one choice per target out.

`uniform` gives every target the same share of its bytes, as the papers' one-shot numbers are made. `solve` weighs targets
against each other: one multiple-choice knapsack for the whole model, in bytes. Its linear relaxation is solved exactly by
taking the steps along every target's convex hull in the order of loss saved per byte; that gives a lower bound, a price per
byte, and a solution close to it. Options whose reduced cost at that price exceeds the gap cannot be part of a better solution,
so what is left for the integer program (HiGHS) is small, and its answer is exact.

Sources: rank = ⌊kept · out · in / (out + in)⌋ from each target's own shape: SVD-LLM, arXiv 2403.07378 (its code takes one rank
for q, k, v and o, which is wrong where k and v are narrower). The relaxation: Sinha and Zoltners, Operations Research 27
(1979); reduced-cost fixing: Pisinger, European Journal of Operational Research 83 (1995).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from . import amount
from .compress.base import Choice, Offer
from .errors import BudgetError


@dataclass(frozen=True)
class Option:
    """One way to store a target: what it costs in bytes, and the loss that is predicted for it."""

    choice: Choice
    nbytes: int
    loss: float


def require_ratio(ratio: float) -> None:
    """Refuse a ratio outside [0, 1)."""
    try:
        amount.checked_ratio(ratio)
    except ValueError as error:
        raise BudgetError(f"The ratio {error} (got {ratio:g})") from None


def uniform(offers: Mapping[str, tuple[int, Sequence[Offer]]], ratio: float | None) -> dict[str, Offer]:
    """Every target keeps 1 - ratio of its bytes: the largest offer that fits, or dense where that is no saving.

    Args:
        offers: target -> (its bytes when dense, what its method offers, ascending in bytes).
        ratio: fraction of the targets' bytes to remove, 0 <= ratio < 1; 0 keeps everything dense. None takes the only offer
            of methods whose settings fix the size.

    Returns:
        target -> the offer; a dense one has an empty `Choice` and the dense bytes.

    Raises:
        BudgetError: the ratio is out of range, missing, or some target would be left with nothing.
    """
    if ratio is not None:
        require_ratio(ratio)
    chosen: dict[str, Offer] = {}
    starved: list[str] = []
    for name, (dense, ways) in offers.items():
        if ratio is None:
            if len(ways) > 1:
                raise BudgetError("How much should go? The recipe names no ratio.", amount.ASK)
            chosen[name] = ways[0] if ways and ways[0].nbytes < dense else Offer(Choice(), dense)
            continue
        # guards against 0.6 * 100 = 59.99999: a rank must not depend on how a decimal is rounded
        allowed = int((1 - ratio) * dense + 1e-6)
        fitting = [way for way in ways if way.nbytes <= allowed]
        if ratio == 0 or not ways:
            chosen[name] = Offer(Choice(), dense)
        elif fitting:
            chosen[name] = fitting[-1]
        else:
            starved.append(f"{name} ({dense:,} bytes)")
    if starved:
        raise BudgetError(
            f"At ratio {ratio:g}, {len(starved)} targets have no form that is small enough, {starved[0]} first.",
            "Lower the ratio or rank_multiple, or keep those targets dense (keep: [PATTERN] in the recipe).",
        )
    return chosen


@dataclass(frozen=True)
class Solved:
    """One option per target.

    Args:
        options: target -> its option, in the order in which the targets were given.
        nbytes: what they cost together.
        loss: what they lose together, as predicted.
        bound: no choice of options within the budget loses less than this.
        exact: whether the integer program closed the gap that the relaxation had left.
    """

    options: dict[str, Option]
    nbytes: int
    loss: float
    bound: float
    exact: bool

    @property
    def gap(self) -> float:
        """How far the loss may be from the best possible, relative to it."""
        return 0.0 if self.exact else (self.loss - self.bound) / max(self.bound, 1e-300)


def solve(options: Mapping[str, Sequence[Option]], budget: int, most_nodes: int = 2_000) -> Solved:
    """The options with the least predicted loss in all whose bytes stay within the budget.

    Args:
        options: target -> the ways to store it; the dense one belongs among them.
        budget: bytes for all targets together.
        most_nodes: of the integer program's search; a count and not a time, so that the result is the same on any machine.

    Raises:
        BudgetError: even the smallest options do not fit; says what they come to.
        ValueError: a target has no option, or a loss is not finite.
    """
    hulls = {name: _useful(name, ways) for name, ways in options.items()}
    smallest = sum(ways[0].nbytes for ways in hulls.values())
    if smallest > budget:
        largest = sum(max(way.nbytes for way in ways) for ways in options.values())
        raise BudgetError(
            f"The budget allows {budget:,} bytes; the smallest forms of all {len(options)} targets come to {smallest:,}.",
            f"A ratio up to {math.floor(1000 * (1 - smallest / largest)) / 1000:g} can be reached by this method.",
        )
    taken, price, bound = _relaxed(hulls, budget)
    found = _filled(hulls, taken, budget)
    loss = math.fsum(hulls[name][index].loss for name, index in found.items())
    exact = loss <= bound * (1 + 1e-12)
    if not exact:
        better = _integer(hulls, budget, price, loss, bound, most_nodes)
        if better is not None:
            exact = True
            better_loss = math.fsum(hulls[name][index].loss for name, index in better.items())
            if better_loss < loss:
                found, loss = better, better_loss
    chosen = {name: hulls[name][found[name]] for name in options}
    return Solved(chosen, sum(way.nbytes for way in chosen.values()), loss, bound, exact)


def _useful(name: str, ways: Sequence[Option]) -> list[Option]:
    """The options that no other one beats in bytes and loss, ascending in bytes and descending in loss."""
    if not ways:
        raise ValueError(f"{name} has no option")
    if bad := [way for way in ways if not math.isfinite(way.loss)]:
        raise ValueError(f"{name}: the predicted loss of {bad[0].choice} is not finite")
    kept: list[Option] = []
    for way in sorted(ways, key=lambda way: (way.nbytes, way.loss)):
        if not kept or way.loss < kept[-1].loss:
            kept.append(way)
    return kept


def _relaxed(hulls: Mapping[str, Sequence[Option]], budget: int) -> tuple[dict[str, int], float, float]:
    """The linear relaxation: (target -> option index with the fractional step left out, price per byte, lower bound)."""
    steps = []
    for name, ways in hulls.items():
        corners = _corners(ways)
        for before, after in pairwise(corners):
            saved, cost = ways[before].loss - ways[after].loss, ways[after].nbytes - ways[before].nbytes
            steps.append((-saved / cost, name, after, saved, cost))
    steps.sort(key=lambda step: step[:3])
    taken = dict.fromkeys(hulls, 0)
    left = budget - sum(ways[0].nbytes for ways in hulls.values())
    loss = math.fsum(ways[0].loss for ways in hulls.values())
    for slope, name, after, saved, cost in steps:
        if cost > left:
            return taken, -slope, max(0.0, loss + slope * left)
        taken[name], left, loss = after, left - cost, loss - saved
    return taken, 0.0, max(0.0, math.fsum(ways[-1].loss for ways in hulls.values()))


def _corners(ways: Sequence[Option]) -> list[int]:
    """Indices of the lower convex hull of (bytes, loss)."""
    hull: list[int] = []
    for index, way in enumerate(ways):
        while len(hull) > 1:
            a, b = ways[hull[-2]], ways[hull[-1]]
            if (a.loss - b.loss) * (way.nbytes - a.nbytes) > (a.loss - way.loss) * (b.nbytes - a.nbytes):
                break
            hull.pop()
        hull.append(index)
    return hull


def _filled(hulls: Mapping[str, Sequence[Option]], taken: Mapping[str, int], budget: int) -> dict[str, int]:
    """Spend what the relaxation left over: again and again the step of one target that saves most and still fits."""
    found = dict(taken)
    left = budget - sum(hulls[name][index].nbytes for name, index in found.items())

    def step(name: str) -> tuple[float, str, int] | None:
        ways, index = hulls[name], found[name]
        fitting = [i for i in range(index + 1, len(ways)) if ways[i].nbytes - ways[index].nbytes <= left]
        return (ways[fitting[-1]].loss - ways[index].loss, name, fitting[-1]) if fitting else None  # losses only fall

    steps = [each for name in found if (each := step(name))]
    heapq.heapify(steps)
    while steps:
        _, name, after = heapq.heappop(steps)
        cost = hulls[name][after].nbytes - hulls[name][found[name]].nbytes
        if cost <= left:
            left -= cost
            found[name] = after
        if following := step(name):
            heapq.heappush(steps, following)
    return found


def _integer(
    hulls: Mapping[str, Sequence[Option]], budget: int, price: float, loss: float, bound: float, most_nodes: int
) -> dict[str, int] | None:
    """The exact answer among the options that may be part of something better than `loss`; None if the search was cut off."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    columns: list[tuple[str, int]] = []
    rows: list[int] = []
    for row, (name, ways) in enumerate(hulls.items()):
        priced = [way.loss + price * way.nbytes for way in ways]
        least = min(priced)
        open_ways = [index for index, each in enumerate(priced) if bound + each - least <= loss * (1 + 1e-9)]
        columns += [(name, index) for index in open_ways]
        rows += [row] * len(open_ways)
    costs = np.array([hulls[name][index].nbytes for name, index in columns], dtype=np.int64)
    unit = math.gcd(*(int(cost) for cost in costs))  # small integers, so that the solver's tolerance cannot hide a byte
    losses = np.array([hulls[name][index].loss for name, index in columns]) / max(loss, 1e-300)
    each = csr_array((np.ones(len(columns)), (rows, range(len(columns)))), shape=(len(hulls), len(columns)))
    result = milp(
        losses,
        integrality=np.ones(len(columns)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(each, 1, 1),
            LinearConstraint((costs // unit)[None].astype(float), 0, budget // unit),
        ],
        options={"node_limit": most_nodes, "mip_rel_gap": 1e-9},
    )
    if result.status != 0 or result.x is None:
        return None
    found = {columns[i][0]: columns[i][1] for i in np.flatnonzero(result.x > 0.5)}
    within = sum(hulls[name][index].nbytes for name, index in found.items()) <= budget
    return found if len(found) == len(hulls) and within else None
