"""The contract of a method, and the registry that everything else is derived from.

A method is one pure function over one target's weight and statistics, registered with its name, the statistics that it needs
and its source. It sees no model, no disk, no terminal. It does what is expensive once and returns a `Solution` that answers
every budget the solver asks about.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ..errors import RequestError, did_you_mean
from .forms import Form, LowRank
from .linalg import root

# the statistics that a method may ask for; calibrate/stats.py collects them
NEEDS = frozenset({"gram", "output_gram", "mean", "abs_mean", "mean_square"})


class Settings(BaseModel):
    """A method's own settings; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Choice:
    """What the budget gives a target: a rank, or dense (rank None)."""

    rank: int | None = None

    @property
    def dense(self) -> bool:
        return self.rank is None


class GroupStats:
    """What calibration says about the input that a group of targets reads.

    Args:
        tokens: how many tokens the means are over.
        gram: (in, in) float32, mean over tokens of x xᵀ.
        mean, abs_mean, mean_square: (in,) float32, means over tokens of x, |x| and x².
    """

    def __init__(
        self,
        tokens: int,
        gram: Tensor | None = None,
        mean: Tensor | None = None,
        abs_mean: Tensor | None = None,
        mean_square: Tensor | None = None,
    ) -> None:
        self.tokens, self.gram, self.mean, self.abs_mean, self.mean_square = tokens, gram, mean, abs_mean, mean_square

    @cached_property
    def gram_root(self) -> Tensor | None:
        """The gram's symmetric root, (in, in) float64, computed once for all targets of the group; None without a gram."""
        return None if self.gram is None else root(self.gram)


@dataclass(frozen=True)
class TargetStats:
    """The statistics of one target: its group's, and the second moment of its own outputs where that was cheaper to collect.

    Args:
        group: shared by all targets that read the same input.
        output_gram: (out, out) float32, mean over tokens of y yᵀ with y = W x (no bias), or None; then `group.gram` is there.
    """

    group: GroupStats
    output_gram: Tensor | None = None


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
        """The loss of dropping the target altogether, by which errors are made relative."""


@dataclass(frozen=True)
class LowRankSolution(Solution):
    """Low rank whose components add up: what a rank loses is the energy of those it leaves out.

    Args:
        energy: (k,) float64, what is lost when component i is dropped; descending.
    """

    energy: Tensor

    def rank(self, choice: Choice) -> int:
        """The rank that is asked for; a dense target is never solved."""
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
    """Two full factors of which any leading part is the optimum of its rank.

    Args:
        left: (out, k) float64.
        right: (k, in) float64.
    """

    left: Tensor
    right: Tensor

    def form(self, choice: Choice) -> LowRank:
        rank = self.rank(choice)
        return LowRank(self.left[:, :rank], self.right[:rank])


Solve = Callable[[Tensor, TargetStats, Any], Solution]  # the last is the method's own Settings


@dataclass(frozen=True)
class Method:
    """A registered method.

    Args:
        name: as recipes write it.
        solve: (weight (out, in), statistics, settings) -> Solution; pure.
        settings: the pydantic class of its settings.
        needs: the statistics it reads, of `NEEDS`. 'output_gram' asks for the second moment of the outputs from whichever
            side is cheaper: as `TargetStats.output_gram`, or as the group's gram.
        source: the paper or work it comes from.
    """

    name: str
    solve: Solve
    settings: type[Settings]
    needs: frozenset[str]
    source: str

    @property
    def summary(self) -> str:
        """The first line of the method's file."""
        return (importlib.import_module(self.solve.__module__).__doc__ or self.name).strip().splitlines()[0]


_METHODS: dict[str, Method] = {}


def method(
    name: str, *, source: str, needs: Iterable[str] = (), settings: type[Settings] = Settings
) -> Callable[[Solve], Solve]:
    """Register a function as the method `name`."""
    wanted = frozenset(needs)
    if not wanted <= NEEDS:
        raise ValueError(f"method {name}: unknown statistics {sorted(wanted - NEEDS)}; known: {sorted(NEEDS)}")

    def register(solve: Solve) -> Solve:
        if name in _METHODS and _METHODS[name].solve.__module__ != solve.__module__:
            raise ValueError(f"two methods are called {name}: in {_METHODS[name].solve.__module__} and {solve.__module__}")
        _METHODS[name] = Method(name, solve, settings, wanted, source)
        return solve

    return register


def methods() -> dict[str, Method]:
    """All methods by name: every module of this package registers its own on import."""
    package = importlib.import_module(__package__ or "lrc.compress")
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
    return dict(sorted(_METHODS.items()))


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        RequestError: there is none; says which one was probably meant.
    """
    known = methods()
    if name not in known:
        raise RequestError(f"There is no method '{name}'.", did_you_mean(name, known))
    return known[name]


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with the scale of each component shared evenly between both factors, which suits 16-bit storage.

    Args:
        left: (out, k).
        right: (k, in).
    """
    a, b = left.norm(dim=0), right.norm(dim=1)
    scale = torch.where((a > 0) & (b > 0), (b / a.clamp_min(1e-300)).sqrt(), torch.ones_like(a))
    return left * scale, right / scale[:, None]
