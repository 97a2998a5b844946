"""Mixtures: for every target the budget picks one of several methods.

A recipe with `alternatives` (svd-llm, gptq at every number of bits, low rank with quantized factors, …) turns them into one
method. Its options are those of all alternatives, each marked with the number of its alternative. Their losses are compared
directly, so all alternatives must measure in one metric, the mean squared output error. This is checked when they are solved:
in one metric the loss of replacing a target by zeros is the same for all.

Source: one choice among forms per matrix is from MLoRQ (arXiv 2507.09616, §3); bytes as the common cost, and the joint search
over low rank, bits and dictionaries, are lrc's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..errors import LrcError
from .base import Joinable, Joint, JointUnit, Method, Settings, Solution, TargetStats
from .chain import Chained
from .forms.base import Form
from .options import Choice, JointOption, Option, Shape

_SAME_SCALE = 0.05  # totals in one metric differ by rounding (float32 grams); totals in two metrics differ by factors


class MixtureSettings(Settings):
    """The settings of each alternative, in the order of the alternatives."""

    alternatives: tuple[Settings, ...]

    def remarks(self) -> list[str]:
        return list(dict.fromkeys(remark for each in self.alternatives for remark in each.remarks()))


def mixture(methods: Sequence[Method]) -> Method:
    """One method with the options of all `methods`.

    Where some of them solve several targets together, all members of such a unit get the same alternative; an alternative that
    solves targets alone then gives every member the same choice. Targets outside these units choose among the alternatives that
    solve targets alone or, if there are none, among all.

    Raises:
        ValueError: one of the methods stores factors together for several targets, or its units span several layers; or two of
            them measure losses in different metrics.
    """
    if shared := [method.name for method in methods if method.joint is not None and not method.joint.separable]:
        raise ValueError(f"{shared[0]} shares factors among targets and cannot be one of several alternatives")
    alone_only = [method for method in methods if method.joint is None]
    if other := next((method for method in alone_only[1:] if _weighed_by(method) != _weighed_by(alone_only[0])), None):
        raise ValueError(
            f"{alone_only[0].name} and {other.name} measure losses in different metrics and cannot be alternatives of each "
            "other; take those that measure output errors, such as svd-llm, gptq, qera and compot, or those with gradients, "
            "such as kfac and yaqa"
        )
    alternatives = tuple(methods)
    alone = MixtureAlone(alternatives)
    joint = MixtureJoint(alternatives)
    return Method(
        " | ".join(method.name for method in methods),
        alone.solve,
        MixtureSettings,
        frozenset[str]().union(*(method.needs for method in methods)),
        "; ".join(dict.fromkeys(method.source for method in methods)),
        alone.options,
        alternatives=alternatives,
        joint=Joint(joint.units, joint.options, joint.solve, shares=False, needs=joint.needs) if joint.exists else None,
    )


def _weighed_by(method: Method) -> frozenset[str]:
    """The statistics that decide what an error costs; means only move biases."""
    return frozenset("gram" if name == "output_gram" else name for name in method.needs - {"mean"})


@dataclass(frozen=True)
class MixtureAlone:
    """How a mixture treats a target that is solved alone.

    Args:
        methods: the alternatives.
    """

    methods: tuple[Method, ...]

    @property
    def numbers(self) -> list[int]:
        """The alternatives that such a target chooses among: those that solve targets alone, or all if none does."""
        return [number for number, method in enumerate(self.methods) if method.joint is None] or list(range(len(self.methods)))

    def options(self, shape: Shape, settings: MixtureSettings, multiple: int) -> list[Option]:
        """The options of these alternatives, ascending in bytes."""
        found = [
            replace(option, choice=replace(option.choice, alternative=number))
            for number in self.numbers
            for option in self.methods[number].options(shape, settings.alternatives[number], multiple)
        ]
        return sorted(found, key=lambda option: option.nbytes)

    def solve(self, weight: Tensor, stats: TargetStats, settings: MixtureSettings) -> Mixed:
        """The target; an alternative solves it when a choice of that alternative is first asked for."""
        return Mixed(Alternatives(self.methods, settings, [weight], [stats]), 0, self.numbers[0])


@dataclass(frozen=True)
class MixtureJoint:
    """How a mixture treats the units of targets that some of its alternatives solve together.

    Args:
        methods: the alternatives.
    """

    methods: tuple[Method, ...]

    @property
    def exists(self) -> bool:
        """Whether any alternative solves targets together."""
        return any(method.joint is not None for method in self.methods)

    @property
    def needs(self) -> dict[str, frozenset[str]]:
        """Slot -> the statistics that any alternative reads of the members that fill it."""
        slots = {slot for method in self.methods if method.joint for slot in method.joint.needs}
        return {slot: frozenset[str]().union(*(method.needs_of(slot) for method in self.methods)) for slot in slots}

    def units(self, targets: Sequence[Joinable], settings: MixtureSettings) -> list[JointUnit]:
        """The units of all alternatives that have some.

        Raises:
            LrcError: two alternatives put one target into different units.
        """
        found: dict[str, tuple[JointUnit, str]] = {}
        for method, own in zip(self.methods, settings.alternatives, strict=True):
            for unit in method.joint.units(targets, own) if method.joint else ():
                for name in unit.names:
                    known, by = found.setdefault(name, (unit, method.name))
                    if known != unit:
                        raise LrcError(
                            f"{by} and {method.name} put {name} into different units and cannot be alternatives of each other.",
                            "Take one of them, or two recipes.",
                        )
        return list(dict.fromkeys(unit for unit, _ in found.values()))

    def options(
        self, shapes: Sequence[Shape], slots: Sequence[str], settings: MixtureSettings, multiple: int
    ) -> list[JointOption]:
        """The options of all alternatives for one unit, ascending in bytes."""
        found = []
        for number, (method, own) in enumerate(zip(self.methods, settings.alternatives, strict=True)):
            if method.joint is None:
                options = _same_choice([method.options(shape, own, multiple) for shape in shapes])
            else:
                options = method.joint.options(shapes, slots, own, multiple)
            found += [_of_alternative(option, number) for option in options]
        return sorted(found, key=lambda option: option.nbytes)

    def solve(
        self, weights: Sequence[Tensor], statistics: Sequence[TargetStats], slots: Sequence[str], settings: MixtureSettings
    ) -> Sequence[Solution]:
        """The members; an alternative solves them when a choice of that alternative is first asked for."""
        solved = Alternatives(self.methods, settings, weights, statistics, slots)
        # totals come from an alternative that measures each target's own output, if there is one
        measure = next((number for number, method in enumerate(self.methods) if method.joint is None), 0)
        return [Mixed(solved, member, measure) for member in range(len(weights))]


def _same_choice(options: Sequence[Sequence[Option]]) -> list[JointOption]:
    """The choices that every one of several targets has, as options of all of them together."""
    by_choice = [{option.choice: option for option in own} for own in options]
    common = [choice for choice in by_choice[0] if all(choice in own for own in by_choice)]
    members = [tuple(own[choice] for own in by_choice) for choice in common]
    return [JointOption(c, sum(option.nbytes for option in m), m) for c, m in zip(common, members, strict=True)]


def _of_alternative(option: JointOption, number: int) -> JointOption:
    """The same option, marked as one of this alternative; a member that it leaves dense stays dense."""
    members = tuple(
        member if member.choice.dense else replace(member, choice=replace(member.choice, alternative=number))
        for member in option.members
    )
    return JointOption(replace(option.choice, alternative=number), option.nbytes, members)


@dataclass(frozen=True)
class Alternatives:
    """Targets that each alternative solves when its solutions are first asked for.

    Alternatives that begin with the same step (nystrom, then gptq at 3 or at 4 bits) share what that step finds.

    Args:
        methods: the alternatives.
        settings: theirs.
        weights: (out, in) each.
        statistics: one per weight.
        slots: which slot of the unit each target fills; None for a target that is solved alone.
    """

    methods: tuple[Method, ...]
    settings: MixtureSettings
    weights: Sequence[Tensor]
    statistics: Sequence[TargetStats]
    slots: Sequence[str] | None = None
    _solved: dict[int, Sequence[Solution]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _begun: dict[tuple[str, str], Sequence[Solution]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def solutions(self, number: int) -> Sequence[Solution]:
        """One solution per target, by the alternative of this number."""
        if number not in self._solved:
            self._solved[number] = self._solve(self.methods[number], self.settings.alternatives[number])
        return self._solved[number]

    def _solve(self, method: Method, settings: Any) -> Sequence[Solution]:
        if not method.steps:
            return self._by(method, settings)
        first, second = method.steps
        begun = zip(self._by(first, settings.first), self.weights, self.statistics, strict=True)
        return [Chained(each, second, settings.second, weight, stats) for each, weight, stats in begun]

    def _by(self, method: Method, settings: Settings) -> Sequence[Solution]:
        """The targets solved by a method that is no chain; once for equal settings."""
        key = method.name, settings.model_dump_json()
        if key not in self._begun:
            if self.slots is not None and method.joint is not None:
                self._begun[key] = method.joint.solve(self.weights, self.statistics, self.slots, settings)
            else:
                each = zip(self.weights, self.statistics, strict=True)
                self._begun[key] = [method.solve(weight, stats, settings) for weight, stats in each]
        return self._begun[key]


@dataclass(frozen=True)
class Mixed(Solution):
    """One target with the solutions of all alternatives.

    Args:
        alternatives: solve the target, and the other members of its unit.
        member: its number in the unit.
        measure: the alternative that the total is taken from while none has been asked for.
    """

    alternatives: Alternatives
    member: int
    measure: int
    _solved: dict[int, Solution] = field(default_factory=dict, init=False, repr=False, compare=False)

    def own(self, choice: Choice) -> tuple[Solution, Choice]:
        """The solution of the choice's alternative, and the choice as that alternative writes it.

        Raises:
            ValueError: the choice names no alternative.
            LrcError: two alternatives measure losses in different metrics.
        """
        if choice.alternative is None:
            raise ValueError("a choice of a mixture says which alternative it is of")
        if choice.alternative not in self._solved:
            self._solved[choice.alternative] = self.alternatives.solutions(choice.alternative)[self.member]
            self._require_one_scale()
        return self._solved[choice.alternative], replace(choice, alternative=None)

    def _require_one_scale(self) -> None:
        methods = self.alternatives.methods
        totals = {number: each.total for number, each in self._solved.items() if methods[number].joint is None}
        if not totals:
            return
        least, most = min(totals, key=totals.__getitem__), max(totals, key=totals.__getitem__)
        if totals[most] - totals[least] > _SAME_SCALE * totals[most]:
            raise LrcError(
                f"{methods[least].name} and {methods[most].name} measure losses in different metrics: replacing one target by "
                f"zeros costs {totals[least]:.4g} in the first and {totals[most]:.4g} in the second.",
                "Take alternatives that all measure output errors, such as svd-llm, gptq, qera and compot.",
            )

    def loss(self, choice: Choice) -> float:
        solution, own = self.own(choice)
        return solution.loss(own)

    def form(self, choice: Choice) -> Form:
        solution, own = self.own(choice)
        return solution.form(own)

    @property
    def total(self) -> float:
        if not self._solved:
            self.own(Choice(alternative=self.measure))
        return next(iter(self._solved.values())).total

    @property
    def damping(self) -> float:
        return max((solution.damping for solution in self._solved.values()), default=0.0)
