"""The contract of a method, and the registry that everything else is derived from.

A method is one pure function over one target's weight and statistics, registered with its name, the statistics that it needs
and its source. It sees no model, no disk, no terminal. It does what is expensive once and returns a `Solution` that answers
every budget the solver asks about.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ..errors import RequestError, did_you_mean
from .forms.base import Form, LowRank
from .linalg import OutputDirections, root
from .options import Choice, JointOption, Option, Shape, low_rank_options
from .registry import first_line, import_all

# the statistics that a method may ask for; calibrate/stats.py collects those of a forward, calibrate/backward.py the gradients'
FORWARD_NEEDS = frozenset({"gram", "output_gram", "mean", "abs_mean", "mean_square", "peak_abs_mean"})
BACKWARD_NEEDS = frozenset({"grad_gram", "fisher_in", "weight_grad"})
NEEDS = FORWARD_NEEDS | BACKWARD_NEEDS


class Settings(BaseModel):
    """A method's own settings; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class GroupStats:
    """What calibration says about the input that a group of targets reads.

    Args:
        tokens: how many tokens the means are over.
        gram: (in, in) float32, mean over tokens of x xᵀ.
        mean, abs_mean, mean_square: (in,) float32, means over tokens of x, |x| and x².
        peak_abs_mean: (in,) float32, the largest over calibration samples of the sample's mean |x|.
    """

    def __init__(
        self,
        tokens: int,
        gram: Tensor | None = None,
        mean: Tensor | None = None,
        abs_mean: Tensor | None = None,
        mean_square: Tensor | None = None,
        peak_abs_mean: Tensor | None = None,
    ) -> None:
        self.tokens, self.gram, self.mean, self.abs_mean, self.mean_square = tokens, gram, mean, abs_mean, mean_square
        self.peak_abs_mean = peak_abs_mean
        self._elsewhere: dict[torch.device, GroupStats] = {}

    def to(self, device: torch.device) -> GroupStats:
        """These on `device`; the copy is made once for all targets of the group."""
        held = (self.gram, self.mean, self.abs_mean, self.mean_square, self.peak_abs_mean)
        if all(each is None or each.device == device for each in held):
            return self
        if device not in self._elsewhere:
            moved = [None if each is None else each.to(device) for each in held]
            self._elsewhere[device] = GroupStats(self.tokens, *moved)
        return self._elsewhere[device]

    @cached_property
    def _gram_root(self) -> Tensor:
        assert self.gram is not None
        return root(self.gram)

    def directions(self, weight: Tensor, output_gram: Tensor | None = None) -> OutputDirections:
        """The leading output directions of a weight (out, in); targets of the group share the gram's root where they need it.

        Args:
            output_gram: (out, out) of this weight; used in the place of the group's gram.
        """
        return OutputDirections(weight, self.gram, output_gram, gram_root=lambda: self._gram_root)


@dataclass(frozen=True)
class TargetStats:
    """The statistics of one target: its group's, and the second moment of its own outputs where that was cheaper to collect.

    Args:
        group: shared by all targets that read the same input.
        output_gram: (out, out) float32, mean over tokens of y yᵀ with y = W x (no bias), or None; then `group.gram` is there.
        grad_gram: (out, out) float32, mean over tokens of g gᵀ with g = ∂loss/∂y, the loss summed over a sample's tokens.
        fisher_in: (in,) float32, mean over samples of Σ_out (∂loss/∂W)².
        weight_grad: (out, in) float32, ∂loss/∂W per token: summed over all samples, divided by their tokens.
    """

    group: GroupStats
    output_gram: Tensor | None = None
    grad_gram: Tensor | None = None
    fisher_in: Tensor | None = None
    weight_grad: Tensor | None = None

    def to(self, device: torch.device) -> TargetStats:
        """These on `device`."""
        own = (self.output_gram, self.grad_gram, self.fisher_in, self.weight_grad)
        return TargetStats(self.group.to(device), *(None if each is None else each.to(device) for each in own))

    def directions(self, weight: Tensor) -> OutputDirections:
        """The leading output directions of the target's weight (out, in), from whichever second moment is there."""
        return self.group.directions(weight, self.output_gram)


NOTHING_SEEN = TargetStats(GroupStats(0))  # of methods that need no statistics


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

    @property
    def preferred(self) -> Choice | None:
        """The choice that the method itself would make (a rank for a share of the energy); None leaves it to the budget."""
        return None

    @property
    def damping(self) -> float:
        """The ridge that was added to a gram, relative to its mean diagonal."""
        return 0.0

    @property
    def note(self) -> str:
        """Anything about this target that a reader of the record should know."""
        return ""


@dataclass(frozen=True)
class Curve:
    """What one target loses at each of a method's offers, kept when its solution is gone.

    Args:
        total: loss of dropping the target altogether, in the method's own metric.
        options: ascending in bytes; the dense form is not among them.
        losses: one per option, in the same metric.
        preferred: the choice that the method itself would make, None where it leaves that to the budget.
        scores: what the recipe's rule reads beside the losses (run/importance_scores.py); empty for most.
    """

    total: float
    options: tuple[Option, ...]
    losses: tuple[float, ...]
    preferred: Choice | None = None
    scores: tuple[float, ...] = ()


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
S = TypeVar("S", bound=Solve)
# shape, the method's own Settings, rank multiple -> offers, ascending in bytes
Options = Callable[[Shape, Any, int], list[Option]]
Measured = Callable[[Sequence[Option], int], list[int]]


class Joinable(Protocol):
    """What a joint method knows of a target when it says which belong together (model.targets.Target is one)."""

    @property
    def name(self) -> str: ...
    @property
    def layer(self) -> int: ...
    @property
    def role(self) -> str: ...
    @property
    def group(self) -> str: ...
    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def expert(self) -> int | None: ...
    @property
    def bound(self) -> bool: ...
    @property
    def siblings(self) -> int: ...


@dataclass(frozen=True)
class TargetSet:
    """Targets that are solved together and get one choice.

    Args:
        names: in the order in which the method gets their weights; the first one keeps what they share.
        parts: what each is to the method ('query', 'up'); sizes may depend on it.
    """

    names: tuple[str, ...]
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Joint:
    """How a method treats several targets at once.

    Args:
        sets: (open targets in the order of a forward, settings) -> the sets; a target in none of them is solved alone.
        options: (shapes, parts, settings, rank multiple) -> the ways in which such a set can be stored, ascending in bytes.
        solve: (weights, statistics, parts, settings) -> one solution per member, each answering its own choices; pure.
        across_layers: whether a set may hold targets of several layers. Their statistics then have to lie on disk.
        shares: whether a member's form lends to or borrows from the others'; where none does, a second step may follow.
        needs: by part, the statistics that it reads of members of sets; of a part that is not named here, those of the method.
    """

    sets: Callable[[Sequence[Joinable], Any], list[TargetSet]]
    options: Callable[[Sequence[Shape], Sequence[str], Any, int], list[JointOption]]
    solve: Callable[[Sequence[Tensor], Sequence[TargetStats], Sequence[str], Any], Sequence[Solution]]
    across_layers: bool = False
    shares: bool = True
    needs: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @property
    def separable(self) -> bool:
        """Whether each member's form stands for itself, so that it may be compressed again or be one of several."""
        return not self.shares and not self.across_layers


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
        options: (shape, settings, rank multiple) -> the ways in which it can store such a target, ascending in bytes. One
            option alone means that the settings fix the size, and no ratio is asked for.
        measured: (options, dense bytes) -> indices, ascending: where a loss costs a whole solve, only these are measured, and
            the losses of the others are interpolated. None where every loss is had at once.
        ways: the alternatives of a mixture, by their numbers.
        steps: the two of a chain.
        joint: which targets it solves together, and how; None where each is solved by itself.
    """

    name: str
    solve: Solve
    settings: type[Settings]
    needs: frozenset[str]
    source: str
    options: Options = low_rank_options
    measured: Measured | None = None
    alternatives: tuple[Method, ...] = ()
    steps: tuple[Method, ...] = ()
    joint: Joint | None = None

    @property
    def all_needs(self) -> frozenset[str]:
        """The statistics that it reads, of targets alone and in sets."""
        return self.needs.union(*(self.joint.needs.values() if self.joint else ()))

    def needs_of(self, part: str | None) -> frozenset[str]:
        """The statistics that it reads of a target that it solves alone (None), or as this part of a set."""
        return self.needs if part is None or self.joint is None else self.joint.needs.get(part, self.needs)

    def measured_of(self, alternative: int | None) -> Measured | None:
        """Which offers are measured, of one alternative where there are several."""
        return self.measured if alternative is None else self.alternatives[alternative].measured

    @property
    def summary(self) -> str:
        """The first line of the method's file."""
        return first_line(self.solve, self.name)


def _unsolved(weight: Tensor, stats: TargetStats, settings: Settings) -> Solution:
    raise ValueError("a dense target is not solved")


# of recipes that only drop layers: it offers nothing, so that every target stays dense
DENSE = Method("dense", _unsolved, Settings, frozenset(), "", lambda shape, settings, multiple: [])

_METHODS: dict[str, Method] = {}


def method(
    name: str,
    *,
    source: str,
    needs: Iterable[str] = (),
    settings: type[Settings] = Settings,
    options: Options = low_rank_options,
    measured: Measured | None = None,
    joint: Joint | None = None,
) -> Callable[[S], S]:
    """Register a function as the method `name`."""
    wanted = frozenset(needs)
    if not wanted <= NEEDS:
        raise ValueError(f"method {name}: unknown statistics {sorted(wanted - NEEDS)}; known: {sorted(NEEDS)}")

    def register(solve: S) -> S:
        if name in _METHODS and _METHODS[name].solve.__module__ != solve.__module__:
            raise ValueError(f"two methods are called {name}: in {_METHODS[name].solve.__module__} and {solve.__module__}")
        _METHODS[name] = Method(name, solve, settings, wanted, source, options, measured, joint=joint)
        return solve

    return register


def methods() -> dict[str, Method]:
    """All methods by name: every module of this package registers its own on import."""
    import_all(__package__ or "lrc.compress")
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
