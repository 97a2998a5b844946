"""The contract of a method, and the registry of methods. A method's file imports what it needs from here.

A method is one pure function from a target's weight and statistics (target_stats.py) to a solution (solution.py). It is
registered with its name, the statistics that it needs and its source. It sees no model, no disk and no terminal. It does the
expensive work once, and the `Solution` that it returns answers for every budget that the solver asks about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ..errors import RequestError, did_you_mean
from .options import JointOption, Option, Shape, low_rank_options
from .registry import first_line, import_all
from .solution import Curve, Factored, LowRankSolution, Solution, balanced
from .target_stats import BACKWARD_NEEDS, FORWARD_NEEDS, NEEDS, NOTHING_SEEN, GroupStats, TargetStats

__all__ = [
    "BACKWARD_NEEDS", "DENSE", "FORWARD_NEEDS", "NEEDS", "NOTHING_SEEN", "Curve", "Factored", "GroupStats", "Joinable",
    "Joint", "JointUnit", "LowRankSolution", "Method", "Settings", "Solution", "TargetStats", "balanced", "get_method",
    "method", "methods",
]  # fmt: skip


class Settings(BaseModel):
    """A method's own settings; unknown keys are refused.

    `sized_by` names the setting that fixes the size of a target's form unless it is null; empty where a budget always decides.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sized_by: ClassVar[str] = ""

    def remarks(self) -> list[str]:
        """What a person should know before the method runs with these settings on this machine; the plan prints it."""
        return []


Solve = Callable[[Tensor, TargetStats, Any], Solution]  # (weight, statistics, the method's own Settings)
S = TypeVar("S", bound=Solve)
Options = Callable[[Shape, Any, int], list[Option]]  # (shape, the method's own Settings, rank multiple)
Measured = Callable[[Sequence[Option], int], list[int]]  # (options, dense bytes) -> indices


class Joinable(Protocol):
    """What a joint method knows of a target when it says which ones belong together; model/targets.py's `Target` fits."""

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
class JointUnit:
    """Targets that are solved together and get one choice.

    Args:
        names: the members, in the order in which the method takes their weights. The first one stores what they share.
        slots: which slot of the unit each member fills ('query', 'up'). The words are the method's own; several members may
            fill one slot. Sizes and needed statistics may depend on it.
    """

    names: tuple[str, ...]
    slots: tuple[str, ...]


@dataclass(frozen=True)
class Joint:
    """How a method solves several targets together.

    Args:
        units: (targets that are not kept dense, in the order of a forward pass; settings) -> the units. A target in none of
            them is solved alone.
        options: (shapes, slots, settings, rank multiple) -> the options of one unit, ascending in bytes.
        solve: (weights, statistics, slots, settings) -> one solution per member, each of which answers for its own choices.
            A pure function.
        across_layers: whether a unit may hold targets of several layers. Their statistics must then be on disk.
        shares: whether members store a factor together. Where they do not, a second method may follow.
        needs: slot -> the statistics that the method reads of the members that fill it. For a slot without an entry these
            are the method's own `needs`.
    """

    units: Callable[[Sequence[Joinable], Any], list[JointUnit]]
    options: Callable[[Sequence[Shape], Sequence[str], Any, int], list[JointOption]]
    solve: Callable[[Sequence[Tensor], Sequence[TargetStats], Sequence[str], Any], Sequence[Solution]]
    across_layers: bool = False
    shares: bool = True
    needs: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @property
    def separable(self) -> bool:
        """Whether each member's form is independent of the others, so that it may be compressed again or be an alternative."""
        return not self.shares and not self.across_layers


@dataclass(frozen=True)
class Method:
    """A registered method.

    Args:
        name: as recipes write it.
        solve: (weight (out, in), statistics, settings) -> Solution. A pure function.
        settings: the pydantic class of its settings.
        needs: the statistics that it reads, out of `NEEDS`. 'output_gram' asks for the second moment of the outputs from
            whichever side is cheaper: as `TargetStats.output_gram`, or as the group's gram.
        source: the paper or work that it comes from.
        options: (shape, settings, rank multiple) -> the options of a target, ascending in bytes. A single option means that
            the settings fix the size; the recipe then has no ratio.
        measured: (options, dense bytes) -> indices, ascending. Where one loss costs a whole solve, only these options are
            measured and the other losses are interpolated. None: one solve gives every loss.
        alternatives: of a mixture, its methods in the order of their numbers.
        steps: of a chain, its two methods.
        joint: which targets it solves together, and how; None: it solves every target alone.
        power: with which power of a matrix's width the time of `solve` grows: 3 for decompositions and updates column by
            column, 2 where most of it is spent on every number by itself. Only predictions of time read it.
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
    power: int = 3

    @property
    def all_needs(self) -> frozenset[str]:
        """The statistics that it reads of any target, alone or in a unit of several."""
        return self.needs.union(*(self.joint.needs.values() if self.joint else ()))

    @property
    def across_layers(self) -> bool:
        """Whether it may solve targets of several layers together."""
        return self.joint is not None and self.joint.across_layers

    def needs_of(self, slot: str | None) -> frozenset[str]:
        """The statistics that it reads of a target that is solved alone (None), or that fills this slot of a unit."""
        return self.needs if slot is None or self.joint is None else self.joint.needs.get(slot, self.needs)

    def measured_of(self, alternative: int | None) -> Measured | None:
        """How it picks the options to measure; of a mixture, how this alternative does."""
        return self.measured if alternative is None else self.alternatives[alternative].measured

    @property
    def summary(self) -> str:
        """The first line of the method's file."""
        return first_line(self.solve, self.name)


def _unsolved(weight: Tensor, stats: TargetStats, settings: Settings) -> Solution:
    raise ValueError("a dense target is not solved")


# for recipes that only drop layers: it has no options, so every target stays dense
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
    power: int = 3,
) -> Callable[[S], S]:
    """Register the decorated function as the method `name`; the arguments are those of `Method`."""
    wanted = frozenset(needs)
    if not wanted <= NEEDS:
        raise ValueError(f"method {name}: unknown statistics {sorted(wanted - NEEDS)}; known: {sorted(NEEDS)}")

    def register(solve: S) -> S:
        if name in _METHODS and _METHODS[name].solve.__module__ != solve.__module__:
            raise ValueError(f"two methods are called {name}: in {_METHODS[name].solve.__module__} and {solve.__module__}")
        _METHODS[name] = Method(name, solve, settings, wanted, source, options, measured, joint=joint, power=power)
        return solve

    return register


def methods() -> dict[str, Method]:
    """All methods by name. Every file in compress/ and in its folders is imported, and registers its method on import."""
    import_all(__package__ or "lrc.compress")
    return dict(sorted(_METHODS.items()))


def get_method(name: str) -> Method:
    """The method of this name.

    Raises:
        RequestError: there is none; the message names the closest one.
    """
    known = methods()
    if name not in known:
        raise RequestError(f"There is no method '{name}'.", did_you_mean(name, known))
    return known[name]
