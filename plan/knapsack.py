"""The budget: options with cost and predicted loss in, one choice per target out.

`uniform` gives every target the same share of its bytes, as the papers' one-shot numbers are made. `solve` weighs targets
against each other: one multiple-choice knapsack for the whole model, in bytes. Its linear relaxation is solved exactly by
taking the steps along every target's convex hull in the order of loss saved per byte; that gives a lower bound, a price per
byte, and a solution close to it. Options whose reduced cost at that price exceeds the gap cannot be part of a better solution,
so what is left for the integer program (HiGHS) is small, and its answer is exact. Items that may be dropped together (a half
of a layer) are one group: its hull is that of its items' steps in order, and of nothing at all.

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
from typing import Protocol

import numpy as np

from ..compress.offers import Choice, Offer
from ..errors import BudgetError
from . import budget as amount


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


def uniform(
    offers: Mapping[str, tuple[int, Sequence[Offer]]], ratio: float | None, asked: str | None = None
) -> dict[str, Offer]:
    """Every target keeps 1 - ratio of its bytes: the largest offer that fits, or dense where that is no saving.

    Args:
        offers: target -> (its bytes when dense, what its method offers, ascending in bytes).
        ratio: fraction of the targets' bytes to remove, 0 <= ratio < 1; 0 keeps everything dense. None takes the only offer
            of methods whose settings fix the size.
        asked: what was asked for, for the error; a ratio where nothing is said.

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
            f"At {asked or f'ratio {ratio:g}'}, {len(starved)} targets have no form that is small enough, {starved[0]} first.",
            "Ask for less to go, lower rank_multiple, or keep those targets dense (keep: [PATTERN] in the recipe).",
        )
    return chosen


@dataclass(frozen=True)
class Bundle:
    """Items that may be dropped together: one choice that takes the place of a choice for each of them.

    Args:
        items: their names; no item is in two bundles.
        loss: what is lost without them; they cost no bytes then.
    """

    items: tuple[str, ...]
    loss: float


@dataclass(frozen=True)
class Solved:
    """One option per item that stays.

    Args:
        options: item -> its option, in the order in which the items were given.
        nbytes: what they cost together.
        loss: what they lose together, and what the dropped bundles lose, as predicted.
        bound: no choice within the budget loses less than this.
        exact: whether the integer program closed the gap that the relaxation had left.
        dropped: the bundles that go, in the order in which they were given.
    """

    options: dict[str, Option]
    nbytes: int
    loss: float
    bound: float
    exact: bool
    dropped: tuple[str, ...] = ()

    @property
    def gap(self) -> float:
        """How far the loss may be from the best possible, relative to it."""
        return 0.0 if self.exact else (self.loss - self.bound) / max(self.bound, 1e-300)


def solve(
    options: Mapping[str, Sequence[Option]],
    budget: int,
    bundles: Mapping[str, Bundle] | None = None,
    most_nodes: int = 1_000,
) -> Solved:
    """The options with the least predicted loss in all whose bytes stay within the budget.

    Args:
        options: item -> the ways to store it; the dense one belongs among them.
        budget: bytes for all items together.
        bundles: name -> items that may be dropped together.
        most_nodes: of the integer program's search; a count and not a time, so that the result is the same on any machine.

    Raises:
        BudgetError: even the smallest options do not fit; says what they come to.
        ValueError: an item has no option, a loss is not finite, or bundles overlap.
    """
    problem = _Problem({name: _useful(name, ways) for name, ways in options.items()}, dict(bundles or {}), budget)
    if problem.smallest > budget:
        largest = sum(max(way.nbytes for way in ways) for ways in options.values())
        raise BudgetError(
            f"The budget allows {budget:,} bytes; the smallest forms of all {len(options)} targets come to "
            f"{problem.smallest:,}.",
            f"A ratio up to {math.floor(1000 * (1 - problem.smallest / largest)) / 1000:g} can be reached by this method.",
        )
    answer, price, bound = problem.relaxed()
    answer = problem.filled(answer)
    loss = problem.loss(answer)
    exact = loss <= bound * (1 + 1e-12)
    if not exact:
        better, proven, exact = problem.integer(price, loss, bound, most_nodes)
        if better is not None and (better_loss := problem.loss(better)) < loss:
            answer, loss = better, better_loss
        bound = max(bound, min(proven, loss))
    chosen = {name: problem.hulls[name][answer.indices[name]] for name in options if name in answer.indices}
    dropped = tuple(name for name in problem.bundles if name in answer.dropped)
    return Solved(chosen, sum(way.nbytes for way in chosen.values()), loss, bound, exact, dropped)


class _Costed(Protocol):
    """Something with bytes and a predicted loss."""

    @property
    def nbytes(self) -> int: ...
    @property
    def loss(self) -> float: ...


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


@dataclass(frozen=True)
class _Answer:
    """Item -> index of its option, for the items that stay; and the bundles that do not."""

    indices: dict[str, int]
    dropped: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Step:
    """From one corner of an item's hull to the next: the option it comes to, its further bytes, and what they save."""

    item: str
    option: int
    nbytes: int
    saved: float

    @property
    def order(self) -> tuple[float, str, int]:
        """The steepest first."""
        return -self.saved / self.nbytes, self.item, self.option


@dataclass(frozen=True)
class _Corner:
    """A corner of the convex hull of all that a group can be, after so many steps of its items (None: it is dropped)."""

    nbytes: int
    loss: float
    steps: int | None


class _Problem:
    """Options that are useful, by item; bundles; and the budget."""

    def __init__(self, hulls: Mapping[str, list[Option]], bundles: Mapping[str, Bundle], budget: int) -> None:
        self.hulls, self.bundles, self._budget = hulls, bundles, budget
        members = [item for bundle in bundles.values() for item in bundle.items]
        if len(set(members)) < len(members) or not set(members) <= set(hulls):
            raise ValueError("bundles share items, or name items that have no options")
        if bad := [name for name, bundle in bundles.items() if not bundle.items or not math.isfinite(bundle.loss)]:
            raise ValueError(f"{bad[0]}: no items, or the predicted loss is not finite")
        alone = hulls.keys() - set(members)
        groups = {name: bundle.items for name, bundle in bundles.items()}
        self._groups = groups | {name: (name,) for name in hulls if name in alone}
        self._steps = {
            group: sorted((step for name in items for step in _steps(name, hulls[name])), key=lambda step: step.order)
            for group, items in self._groups.items()
        }
        self._corners = {group: self._hull(group) for group in self._groups}
        self.smallest = sum(corners[0].nbytes for corners in self._corners.values())

    def loss(self, answer: _Answer) -> float:
        """What is lost in all."""
        stays = (self.hulls[name][index].loss for name, index in answer.indices.items())
        return math.fsum([*stays, *(self.bundles[name].loss for name in answer.dropped)])

    def _hull(self, group: str) -> list[_Corner]:
        """Corners of the lower convex hull of a group: its items' hulls added up, with nothing at all where it may go."""
        smallest = [self.hulls[name][0] for name in self._groups[group]]
        corners = [_Corner(sum(way.nbytes for way in smallest), math.fsum(way.loss for way in smallest), 0)]
        for step in self._steps[group]:
            last = corners[-1]
            corners.append(_Corner(last.nbytes + step.nbytes, last.loss - step.saved, len(corners)))
        if group in self.bundles:
            gone = _Corner(0, self.bundles[group].loss, None)
            corners = [gone, *(corner for corner in corners if corner.loss < gone.loss and corner.nbytes > 0)]
            corners = [corners[index] for index in _lower_hull(corners)]
        return corners

    def relaxed(self) -> tuple[_Answer, float, float]:
        """The linear relaxation: (the answer with the fractional step left out, price per byte, lower bound)."""
        steps = []
        for group, corners in self._corners.items():
            for number, (before, after) in enumerate(pairwise(corners), 1):
                saved, cost = before.loss - after.loss, after.nbytes - before.nbytes
                steps.append((-saved / cost, group, number, saved, cost))
        steps.sort(key=lambda step: step[:3])
        taken = dict.fromkeys(self._groups, 0)
        left = self._budget - self.smallest
        loss = math.fsum(corners[0].loss for corners in self._corners.values())
        for slope, group, number, saved, cost in steps:
            if cost > left:
                return self._answer(taken), -slope, max(0.0, loss + slope * left)
            taken[group], left, loss = number, left - cost, loss - saved
        return self._answer(taken), 0.0, max(0.0, math.fsum(corners[-1].loss for corners in self._corners.values()))

    def _answer(self, taken: Mapping[str, int]) -> _Answer:
        indices: dict[str, int] = {}
        dropped: set[str] = set()
        for group, number in taken.items():
            steps = self._corners[group][number].steps
            if steps is None:
                dropped.add(group)
                continue
            indices |= dict.fromkeys(self._groups[group], 0)
            indices |= {step.item: step.option for step in self._steps[group][:steps]}
        return _Answer(indices, frozenset(dropped))

    def filled(self, answer: _Answer) -> _Answer:
        """Spend what the relaxation left over: again and again the step of one item that saves most and still fits."""
        found, hulls = dict(answer.indices), self.hulls
        left = self._budget - sum(hulls[name][index].nbytes for name, index in found.items())

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
        return _Answer(found, answer.dropped)

    def integer(self, price: float, loss: float, bound: float, most_nodes: int) -> tuple[_Answer | None, float, bool]:
        """The best answer among the choices that may be part of something better than `loss`.

        The least priced losses of all groups give the bound; a choice that lifts its group's by more than the gap cannot be
        part of a better answer.

        Returns:
            The answer, None where none was found; a lower bound; and whether the search came to its end.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        columns: list[tuple[str, int | None]] = []  # item and option; bundle and None
        entries: list[tuple[int, int]] = []  # (row, column): which items a choice decides
        row = {name: number for number, name in enumerate(self.hulls)}
        most = loss * (1 + 1e-9)
        for group, items in self._groups.items():
            priced = {name: [way.loss + price * way.nbytes for way in self.hulls[name]] for name in items}
            stays = math.fsum(min(each) for each in priced.values())
            gone = self.bundles[group].loss if group in self.bundles else math.inf
            least = min(stays, gone)
            for name in items:
                for index, each in enumerate(priced[name]):
                    if bound + (stays - min(priced[name]) + each) - least <= most:
                        entries.append((row[name], len(columns)))
                        columns.append((name, index))
            if bound + gone - least <= most:
                entries += [(row[name], len(columns)) for name in items]
                columns.append((group, None))
        costs = np.array([0 if i is None else self.hulls[name][i].nbytes for name, i in columns], dtype=np.int64)
        lost = [self.bundles[name].loss if i is None else self.hulls[name][i].loss for name, i in columns]
        unit = math.gcd(*(int(cost) for cost in costs)) or 1  # small integers: the solver's tolerance cannot hide a byte
        each = csr_array((np.ones(len(entries)), tuple(zip(*entries, strict=True))), shape=(len(row), len(columns)))
        result = milp(
            np.array(lost) / max(loss, 1e-300),
            integrality=np.ones(len(columns)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(each, 1, 1),
                LinearConstraint((costs // unit)[None].astype(float), 0, self._budget // unit),
            ],
            options={"node_limit": most_nodes, "mip_rel_gap": 1e-9},
        )
        dual = result.mip_dual_bound
        proven = bound if dual is None or not math.isfinite(dual) else dual * loss
        if result.x is None:
            return None, proven, False
        taken = [columns[i] for i in np.flatnonzero(result.x > 0.5)]
        answer = _Answer({name: i for name, i in taken if i is not None}, frozenset(name for name, i in taken if i is None))
        decided = len(answer.indices) + sum(len(self.bundles[name].items) for name in answer.dropped)
        within = sum(self.hulls[name][index].nbytes for name, index in answer.indices.items()) <= self._budget
        return (answer, proven, result.status == 0) if decided == len(row) and within else (None, bound, False)


def _steps(name: str, ways: Sequence[Option]) -> list[_Step]:
    """The steps along an item's convex hull."""
    found = []
    for before, after in pairwise(_lower_hull(ways)):
        saved, cost = ways[before].loss - ways[after].loss, ways[after].nbytes - ways[before].nbytes
        found.append(_Step(name, after, cost, saved))
    return found


def _lower_hull(ways: Sequence[_Costed]) -> list[int]:
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
