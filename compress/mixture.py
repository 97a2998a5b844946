"""Mixtures: every target is stored by whichever of several methods the budget prefers there.

A recipe with `alternatives` (svd-llm, gptq at every number of bits, low rank with quantized factors, …) makes one method of
them: it offers all that they offer, and every option says whose it is. What they lose is compared as it stands, so all of them
must measure in one metric, the mean squared output error; that is checked where they are solved, since the loss of dropping a
target altogether is then the same for all.

Source: one choice among forms per matrix is MLoRQ's (arXiv 2507.09616, §3); bytes as the common cost and the joint search over
low rank, bits and dictionaries are lrc's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..errors import LrcError
from .base import Joinable, Joint, Method, Settings, Solution, TargetSet, TargetStats
from .chain import Chained
from .forms.base import Form
from .options import Choice, JointOption, Option, Shape

_SAME_SCALE = 0.05  # totals in one metric differ by rounding (float32 grams), those in two by factors


class MixtureSettings(Settings):
    """Settings of the alternatives, in their order."""

    parts: tuple[Settings, ...]


def mixture(methods: Sequence[Method]) -> Method:
    """The method that offers what any of `methods` offers.

    Where some of them solve several targets together, the targets of such a set get one alternative; one that solves targets
    alone is offered with the same choice for all of the set. Targets in no set choose among the alternatives that solve targets
    alone, or, where there are none, among all.

    Raises:
        ValueError: forms of one of them share something, or its sets reach over several layers.
    """
    if shared := [method.name for method in methods if method.joint is not None and not method.joint.separable]:
        raise ValueError(f"{shared[0]} shares factors among targets and cannot be one of several alternatives")
    alone = [alternative for alternative, method in enumerate(methods) if method.joint is None] or list(range(len(methods)))

    def solve(weight: Tensor, stats: TargetStats, settings: Any) -> Mixed:
        all_of = _solver(methods, settings, [weight], [stats])
        return Mixed(tuple(methods), lambda alternative: all_of(alternative)[0], alone[0])

    def options(shape: Shape, settings: Any, multiple: int) -> list[Option]:
        found = [
            replace(option, choice=replace(option.choice, alternative=alternative))
            for alternative in alone
            for option in methods[alternative].options(shape, settings.parts[alternative], multiple)
        ]
        return sorted(found, key=lambda option: option.nbytes)

    return Method(
        " | ".join(method.name for method in methods),
        solve,
        MixtureSettings,
        frozenset[str]().union(*(method.needs for method in methods)),
        "; ".join(dict.fromkeys(method.source for method in methods)),
        options,
        alternatives=tuple(methods),
        joint=_joint(methods) if any(method.joint is not None for method in methods) else None,
    )


def _joint(methods: Sequence[Method]) -> Joint:
    """How targets that some of the methods solve together are solved by all of them."""

    def sets(targets: Sequence[Joinable], settings: Any) -> list[TargetSet]:
        """The sets of all methods that have some; one target is in one set, whoever asks for it."""
        found: dict[str, tuple[TargetSet, str]] = {}
        for method, part in zip(methods, settings.parts, strict=True):
            for each in method.joint.sets(targets, part) if method.joint else ():
                for name in each.names:
                    known, by = found.setdefault(name, (each, method.name))
                    if known != each:
                        raise LrcError(
                            f"{by} and {method.name} put {name} into different sets, and cannot be alternatives of each other.",
                            "Take one of them, or two recipes.",
                        )
        return list(dict.fromkeys(each for each, _ in found.values()))

    def options(shapes: Sequence[Shape], parts: Sequence[str], settings: Any, multiple: int) -> list[JointOption]:
        """Every method's ways to store the set."""
        found = []
        for alternative, (method, part) in enumerate(zip(methods, settings.parts, strict=True)):
            ways = (
                _alike([method.options(shape, part, multiple) for shape in shapes])
                if method.joint is None
                else method.joint.options(shapes, parts, part, multiple)
            )
            found += [_of_alternative(option, alternative) for option in ways]
        return sorted(found, key=lambda option: option.nbytes)

    def solve(
        weights: Sequence[Tensor], statistics: Sequence[TargetStats], parts: Sequence[str], settings: Any
    ) -> Sequence[Solution]:
        """The members, each answering for every method; a method solves them when one of them is first asked."""
        all_of = _solver(methods, settings, weights, statistics, parts)

        def member(number: int) -> Mixed:
            return Mixed(tuple(methods), lambda alternative: all_of(alternative)[number], measure)

        # totals are those of an alternative that measures each target's own output, if there is one
        measure = next((alternative for alternative, method in enumerate(methods) if method.joint is None), 0)
        return [member(number) for number in range(len(weights))]

    parts = {part for method in methods if method.joint for part in method.joint.needs}
    needs = {part: frozenset[str]().union(*(method.needs_of(part) for method in methods)) for part in parts}
    return Joint(sets, options, solve, shares=False, needs=needs)


def _solver(
    methods: Sequence[Method],
    settings: Any,
    weights: Sequence[Tensor],
    statistics: Sequence[TargetStats],
    parts: Sequence[str] | None = None,
) -> Callable[[int], Sequence[Solution]]:
    """Number of an alternative -> its solutions of these targets, made when they are first asked for; alternatives that begin
    with the same step share what it finds.

    Args:
        parts: what each target is in a set; None for targets that are solved alone.
    """
    found: dict[tuple[str, str], Sequence[Solution]] = {}

    def by(method: Method, part: Settings) -> Sequence[Solution]:
        key = method.name, part.model_dump_json()
        if key not in found:
            if parts is not None and method.joint is not None:
                found[key] = method.joint.solve(weights, statistics, parts, part)
            else:
                found[key] = [method.solve(weight, stats, part) for weight, stats in zip(weights, statistics, strict=True)]
        return found[key]

    @functools.cache
    def all_of(alternative: int) -> Sequence[Solution]:
        method, part = methods[alternative], settings.parts[alternative]
        if not method.steps:
            return by(method, part)
        first, second = method.steps
        begun = zip(by(first, part.first), weights, statistics, strict=True)
        return [Chained(each, second, part.second, weight, stats) for each, weight, stats in begun]

    return all_of


def _alike(each: Sequence[Sequence[Option]]) -> list[JointOption]:
    """The choices that are offered to all of several targets."""
    known = [{option.choice: option for option in options} for options in each]
    common = [choice for choice in known[0] if all(choice in ways for ways in known)]
    members = [tuple(ways[choice] for ways in known) for choice in common]
    return [JointOption(c, sum(option.nbytes for option in m), m) for c, m in zip(common, members, strict=True)]


def _of_alternative(option: JointOption, alternative: int) -> JointOption:
    """The same option as one of an alternative; a member that it leaves dense stays dense."""
    members = tuple(
        member if member.choice.dense else replace(member, choice=replace(member.choice, alternative=alternative))
        for member in option.members
    )
    return JointOption(replace(option.choice, alternative=alternative), option.nbytes, members)


@dataclass(frozen=True)
class Mixed(Solution):
    """The alternatives' solutions of one target, each made when it is first asked for.

    Args:
        methods: the alternatives.
        solve: number of an alternative -> its solution.
        measure: the alternative whose total is that of all while none has been asked for.
    """

    methods: tuple[Method, ...]
    solve: Callable[[int], Solution]
    measure: int
    _solved: dict[int, Solution] = field(default_factory=dict, init=False, repr=False, compare=False)

    def part(self, choice: Choice) -> tuple[Solution, Choice]:
        """The solution that a choice belongs to, and the choice in that method's own terms."""
        if choice.alternative is None:
            raise ValueError("a choice of a mixture says which alternative it is of")
        if choice.alternative not in self._solved:
            self._solved[choice.alternative] = self.solve(choice.alternative)
            self._require_one_scale()
        return self._solved[choice.alternative], replace(choice, alternative=None)

    def _require_one_scale(self) -> None:
        totals = {
            alternative: each.total for alternative, each in self._solved.items() if self.methods[alternative].joint is None
        }
        if not totals:
            return
        least, most = min(totals, key=totals.__getitem__), max(totals, key=totals.__getitem__)
        if totals[most] - totals[least] > _SAME_SCALE * totals[most]:
            raise LrcError(
                f"{self.methods[least].name} and {self.methods[most].name} measure losses in different metrics: dropping one "
                f"target costs {totals[least]:.4g} in the one and {totals[most]:.4g} in the other.",
                "Take alternatives that all measure output errors, such as svd-llm, gptq, qera and compot.",
            )

    def loss(self, choice: Choice) -> float:
        solution, own = self.part(choice)
        return solution.loss(own)

    def form(self, choice: Choice) -> Form:
        solution, own = self.part(choice)
        return solution.form(own)

    @property
    def total(self) -> float:
        if not self._solved:
            self.part(Choice(alternative=self.measure))
        return next(iter(self._solved.values())).total

    @property
    def damping(self) -> float:
        return max((solution.damping for solution in self._solved.values()), default=0.0)
