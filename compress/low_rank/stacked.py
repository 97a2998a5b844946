"""Common code of `shared-input`, `basis-sharing` and `cospadi-group`: stacked targets with one shared right factor.

For weights W_1 … W_g whose inputs have the same gram C, the best factors with one right factor are those of the stack
[W_1; …; W_g] (Σ out, in): its projection onto the leading eigenvectors of its outputs' second moment (linalg.py). Each member
owns its rows of the left factor. One rank costs in + Σ out numbers instead of Σ (in + out).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..base import GroupStats, LowRankSolution, Settings, TargetStats, balanced
from ..forms.shared import SharedLowRank
from ..linalg import OutputDirections, project
from ..options import Choice, JointOption, Option, Shape, low_rank_options


def stack_shape(shapes: Sequence[Shape]) -> Shape:
    """The shape of these targets' weights stacked along their outputs."""
    return Shape(sum(shape.out_features for shape in shapes), shapes[0].in_features, shapes[0].element)


def shared_options(shapes: Sequence[Shape], slots: Sequence[str], settings: Settings, multiple: int = 1) -> list[JointOption]:
    """Every rank at which the stack's factors are smaller than the stack; the first member stores the right factor."""

    def member(number: int, shape: Shape, choice: Choice) -> Option:
        assert choice.rank is not None
        rows = shape.out_features + (shape.in_features if number == 0 else 0)
        return Option(choice, choice.rank * rows * shape.element)

    return [
        JointOption(option.choice, option.nbytes, tuple(member(i, shape, option.choice) for i, shape in enumerate(shapes)))
        for option in low_rank_options(stack_shape(shapes), settings, multiple)
    ]


def stack_statistics(statistics: Sequence[TargetStats]) -> TargetStats:
    """Statistics for the stack: the mean of the grams of its members' inputs.

    Where all members read one input this is their own group, whose gram's root they share.

    Raises:
        ValueError: a member has no gram.
    """
    groups = list({id(each.group): each.group for each in statistics}.values())
    grams = [group.gram for group in groups if group.gram is not None]
    if len(grams) < len(groups):
        raise ValueError("sharing a factor needs the gram of the targets' inputs")
    group = groups[0]
    if len(groups) > 1:
        group = GroupStats(min(each.tokens for each in groups), torch.stack([gram.double() for gram in grams]).mean(0))
    return TargetStats(group)


@dataclass(frozen=True)
class Stack:
    """The stacked weights of a unit, solved for every rank.

    Args:
        weight: (Σ out, in).
        directions: the leading output directions of the stack.
    """

    weight: Tensor
    directions: OutputDirections
    _last: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Left (Σ out, rank) and right (rank, in), float64. The last rank is cached, because every member asks for it."""
        if rank not in self._last:
            self._last.clear()
            basis = self.directions.basis(rank)
            self._last[rank] = balanced(basis, project(basis, self.weight))
        return self._last[rank]


@dataclass(frozen=True)
class StackMember(LowRankSolution):
    """One member of a stack: its rows of the left factor, and the shared right factor.

    Args:
        stack: of all members.
        rows: those of this member.
    """

    stack: Stack
    rows: slice

    def form(self, choice: Choice) -> SharedLowRank:
        left, right = self.stack.factors(self.rank(choice))
        return SharedLowRank(left[self.rows], right, lends=self.rows.start == 0)


def solve_stack(weights: Sequence[Tensor], statistics: Sequence[TargetStats]) -> list[StackMember]:
    """One solution per member of a stack, in the metric of the mean of the members' grams.

    Args:
        weights: (out, in) each.
        statistics: one per weight, with a gram (in, in).
    """
    stacked = torch.cat(list(weights))
    stats = stack_statistics(statistics)
    stack = Stack(stacked, stats.directions(stacked))
    members, start = [], 0
    for weight in weights:
        rows = slice(start, start + len(weight))
        members.append(StackMember(stack.directions.energies(rows), stack, rows))
        start = rows.stop
    return members
