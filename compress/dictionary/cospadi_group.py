"""CoSpaDi across layers: neighbouring layers share a dictionary for each of q, k, v, gate and up; the codes are their own.

The weights of one role (q_proj, say) in `layers` neighbouring layers are stacked along their outputs and coded as one matrix,
in the metric of the mean of the layers' grams: every row of every layer is a sum of s of the same k atoms. The bytes that
sharing saves pay for more atoms.

When to use: as `cospadi`, where its running time is acceptable. Published results are better than those of `cospadi` at the
same bytes (Llama-2-7B at 0.2: word perplexity 11.73 against 15.97).

Cost: that of `cospadi` on a stack of `layers` targets. Statistics: a gram (in, in) per group, kept on disk.

Source: CoSpaDi, arXiv 2509.22075, the grouped variant: weights concatenated on their outputs, one metric from the mean of the
grams (an approximation; the exact problem has one metric per layer). Differences: those of `cospadi`. Targets that share
nothing (o, down, experts) are solved as by `cospadi`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base import Joint, Solution, TargetStats, method
from ..forms.dictionary import Dictionary, nbytes
from ..forms.shared import SharedDictionary
from ..low_rank.stacked import stack_shape, stack_statistics
from ..neighbours import NeighbourSettings, neighbours
from ..options import Choice, JointOption, Option, Shape, at_sizes
from . import cospadi
from .sparse_coding import DictionarySolution, best_atoms, dictionary_options


class CospadiGroupSettings(cospadi.CospadiSettings, NeighbourSettings):
    """Settings of `cospadi`, and which layers and roles share a dictionary."""


def options(
    shapes: Sequence[Shape], slots: Sequence[str], settings: CospadiGroupSettings, multiple: int = 1
) -> list[JointOption]:
    """The options of `cospadi` for the stack; the first member stores the atoms, and every member its own codes."""
    found = []
    for option in dictionary_options(stack_shape(shapes), settings, multiple, lambda out_features, in_features: out_features):
        atoms, each = option.choice.atoms, option.choice.nonzeros
        assert atoms is not None
        assert each is not None
        members = []
        for number, shape in enumerate(shapes):
            whole = nbytes(shape, atoms, each * shape.out_features)
            shared = 0 if number == 0 else atoms * shape.in_features * shape.element
            members.append(Option(option.choice, whole - shared))
        total = sum(member.nbytes for member in members)
        if total < sum(shape.nbytes for shape in shapes):  # each member's support is padded, so the sum may be too large
            found.append(JointOption(option.choice, total, tuple(members)))
    return found


@dataclass(frozen=True)
class GroupMember(Solution):
    """One member of a unit: its rows of the stack's codes.

    Args:
        stack: the solution of all members' rows together.
        rows: those of this member.
    """

    stack: DictionarySolution
    rows: slice

    @property
    def total(self) -> float:
        problem = self.stack.problem
        return float(problem.points[self.rows, : problem.seen].square().sum())

    def loss(self, choice: Choice) -> float:
        coded, problem = self.stack.coded(choice), self.stack.problem
        error = problem.points[self.rows] - coded.codes[self.rows] @ best_atoms(coded.codes, problem.points)
        return float(error[:, : problem.seen].square().sum())

    def form(self, choice: Choice) -> SharedDictionary:
        whole = self.stack.form(choice)
        mask = self.stack.coded(choice).mask[self.rows]
        own = Dictionary.of(whole.codes()[self.rows], mask, whole.atoms, whole.pattern)
        return SharedDictionary(own, lends=self.rows.start == 0)


def solve_together(
    weights: Sequence[Tensor], statistics: Sequence[TargetStats], slots: Sequence[str], settings: CospadiGroupSettings
) -> list[GroupMember]:
    """One dictionary for the weights (out, in) of a unit."""
    stacked = torch.cat(list(weights))
    stack = cospadi.solve(stacked, stack_statistics(statistics), settings)
    members, start = [], 0
    for weight in weights:
        rows = slice(start, start + len(weight))
        members.append(GroupMember(stack, rows))
        start = rows.stop
    return members


@method(
    "cospadi-group", source="arXiv 2509.22075", needs=["output_gram"], settings=CospadiGroupSettings,
    options=cospadi.options, measured=at_sizes(0.3, 0.6),
    joint=Joint(neighbours, options, solve_together, across_layers=True, needs={"": frozenset({"gram"})}),
)  # fmt: skip
def solve(weight: Tensor, stats: TargetStats, settings: CospadiGroupSettings) -> DictionarySolution:
    """A target (out, in) that shares nothing: as `cospadi`."""
    return cospadi.solve(weight, stats, settings)
