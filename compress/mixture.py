"""Mixtures: every target is stored by whichever of several methods the budget prefers there.

A recipe with `alternatives` (svd-llm, gptq at every number of bits, low rank with quantized factors, …) makes one method of
them: it offers all that they offer, and every offer says whose it is. What they lose is compared as it stands, so all of them
must measure in one metric, the mean squared output error; that is checked where they are solved, since the loss of dropping a
target altogether is then the same for all.

Source: one choice among forms per matrix is MLoRQ's (arXiv 2507.09616, §3); bytes as the common cost and the joint search over
low rank, bits and dictionaries are lrc's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..errors import LrcError
from .base import Choice, Method, Offer, Settings, Shape, Solution, TargetStats
from .forms import Form

_SAME_SCALE = 0.05  # totals in one metric differ by rounding (float32 grams), those in two by factors


class MixtureSettings(Settings):
    """Settings of the alternatives, in their order."""

    parts: tuple[Settings, ...]


def mixture(methods: Sequence[Method]) -> Method:
    """The method that offers what any of `methods` offers.

    Raises:
        ValueError: one of them solves several targets at once.
    """
    if joined := [method.name for method in methods if method.joint is not None]:
        raise ValueError(f"{joined[0]} solves several targets at once and cannot be one of several alternatives")

    def solve(weight: Tensor, stats: TargetStats, settings: Any) -> Mixed:
        return Mixed(tuple(methods), settings.parts, weight, stats)

    def offers(shape: Shape, settings: Any, multiple: int) -> list[Offer]:
        found = [
            replace(offer, choice=replace(offer.choice, way=way))
            for way, (method, part) in enumerate(zip(methods, settings.parts, strict=True))
            for offer in method.offers(shape, part, multiple)
        ]
        return sorted(found, key=lambda offer: offer.nbytes)

    return Method(
        " | ".join(method.name for method in methods),
        solve,
        MixtureSettings,
        frozenset[str]().union(*(method.needs for method in methods)),
        "; ".join(dict.fromkeys(method.source for method in methods)),
        offers,
        ways=tuple(methods),
    )


@dataclass(frozen=True)
class Mixed(Solution):
    """The alternatives' solutions, each made when it is first asked for."""

    methods: tuple[Method, ...]
    settings: tuple[Settings, ...]
    weight: Tensor
    stats: TargetStats
    _solved: dict[int, Solution] = field(default_factory=dict, init=False, repr=False, compare=False)

    def part(self, choice: Choice) -> tuple[Solution, Choice]:
        """The solution that a choice belongs to, and the choice in that method's own terms."""
        if choice.way is None:
            raise ValueError("a choice of a mixture says which alternative it is of")
        if choice.way not in self._solved:
            method, settings = self.methods[choice.way], self.settings[choice.way]
            self._solved[choice.way] = method.solve(self.weight, self.stats, settings)
            self._require_one_scale()
        return self._solved[choice.way], replace(choice, way=None)

    def _require_one_scale(self) -> None:
        totals = {way: solution.total for way, solution in self._solved.items()}
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
            self.part(Choice(way=0))
        return next(iter(self._solved.values())).total

    @property
    def damping(self) -> float:
        return max((solution.damping for solution in self._solved.values()), default=0.0)
