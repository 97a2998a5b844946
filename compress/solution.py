"""What a method returns: a target that is solved once, and then has a loss and a form for every budget."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from .forms.base import Form, LowRank
from .options import Choice, Option


class Solution(ABC):
    """One target, solved for every budget."""

    @abstractmethod
    def loss(self, choice: Choice) -> float:
        """Mean squared output error per token, in the method's own metric."""

    @abstractmethod
    def form(self, choice: Choice) -> Form:
        """The target in the form that the choice asks for, in float64."""

    @property
    @abstractmethod
    def total(self) -> float:
        """The loss of replacing the target by zeros; relative errors are relative to this."""

    @property
    def preferred(self) -> Choice | None:
        """The choice that the method itself makes (a rank for a share of the energy, say); None leaves it to the budget."""
        return None

    @property
    def damping(self) -> float:
        """The ridge that was added to a gram, relative to its mean diagonal."""
        return 0.0

    @property
    def note(self) -> str:
        """A remark about this target for the record; '' where there is none."""
        return ""


@dataclass(frozen=True)
class Curve:
    """The loss of a target at each of a method's options. It outlives the solution, which holds the factors.

    Args:
        total: loss of replacing the target by zeros, in the method's own metric.
        options: ascending in bytes; the dense form is not among them.
        losses: one per option, in the same metric.
        preferred: the choice that the method itself makes; None leaves it to the budget.
        scores: what the allocation rule reads beside the losses (run/losses/importance_scores.py); empty for most rules.
    """

    total: float
    options: tuple[Option, ...]
    losses: tuple[float, ...]
    preferred: Choice | None = None
    scores: tuple[float, ...] = ()


@dataclass(frozen=True)
class LowRankSolution(Solution):
    """Low rank with losses that add up over components: the loss of a rank is the energy of the components left out.

    Args:
        energy: (k,) float64, the loss of dropping component i; descending.
    """

    energy: Tensor

    def rank(self, choice: Choice) -> int:
        """The rank of a choice.

        Raises:
            ValueError: the choice has none; a dense target is not solved.
        """
        if choice.rank is None:
            raise ValueError("a dense target is not solved")
        return choice.rank

    def loss(self, choice: Choice) -> float:
        return float(self.energy[self.rank(choice) :].sum())

    @property
    def total(self) -> float:
        return float(self.energy.sum())


@dataclass(frozen=True)
class Factored(LowRankSolution):
    """Two factors of full rank whose first k components are optimal for rank k.

    Args:
        left: (out, k) float64.
        right: (k, in) float64.
    """

    left: Tensor
    right: Tensor

    def form(self, choice: Choice) -> LowRank:
        rank = self.rank(choice)
        return LowRank(self.left[:, :rank], self.right[:rank])


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with the scale of each component divided evenly between both factors, which suits 16-bit storage.

    Args:
        left: (out, k).
        right: (k, in).
    """
    a, b = left.norm(dim=0), right.norm(dim=1)
    scale = torch.where((a > 0) & (b > 0), (b / a.clamp_min(1e-300)).sqrt(), torch.ones_like(a))
    return left * scale, right / scale[:, None]
