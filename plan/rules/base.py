"""Rules that share the budget out by a formula of their own: the contract, and its registry.

A rule is one pure function, one file. It gets what the survey has measured of every open target, and the bytes that they may
take together, and says which option each one gets. Rules that weigh losses against each other on one scale need no file: they
differ in what a loss is, and the solver does the rest (plan/allocation.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...compress.base import Curve, Method, Settings
from ...compress.options import Choice, Option, low_rank_options
from ...compress.registry import first_line, import_all


@dataclass(frozen=True)
class Open:
    """One target that the budget decides on.

    Args:
        name, role, group: as in model.targets.Target.
        dense: its bytes when dense.
        curve: what it loses at every option, and the scores that the rule asked for.
        may_be_dense: whether limits leave it the dense form.
    """

    name: str
    role: str
    group: str
    dense: int
    curve: Curve
    may_be_dense: bool = True

    @property
    def most(self) -> int:
        """Bytes of its largest form."""
        return self.dense if self.may_be_dense or not self.curve.options else self.curve.options[-1].nbytes

    @property
    def least(self) -> int:
        """Bytes of its smallest form."""
        return self.curve.options[0].nbytes if self.curve.options else self.dense

    def at(self, nbytes: float) -> Option:
        """The largest form that takes no more; the smallest one where even that is larger."""
        if nbytes + 1e-6 >= self.dense and self.may_be_dense:
            return Option(Choice(), self.dense)
        fitting = [option for option in self.curve.options if option.nbytes <= nbytes + 1e-6]
        if fitting:
            return fitting[-1]
        return self.curve.options[0] if self.curve.options else Option(Choice(), self.dense)


# open targets, bytes for all of them, the rule's own Settings -> option per target
Share = Callable[[Sequence[Open], int, Any], dict[str, Option]]
# method -> why its solutions do not say what the rule reads; '' where they do
WhyNot = Callable[[Method], str]


@dataclass(frozen=True)
class Rule:
    """A registered rule.

    Args:
        name: as recipes write it (`allocation:`).
        share: see `Share`.
        settings: the pydantic class of its settings (`allocation_settings:`).
        source: the paper it comes from.
        needs: statistics that it reads beside the method's own.
        score: what the survey keeps of each target for it: 'components', 'effective-rank', 'angular' or 'tokens'
            (run/losses/importance_scores.py).
        limits: whether it can be held to `limits`.
    """

    name: str
    share: Share
    settings: type[Settings]
    source: str
    needs: frozenset[str] = frozenset()
    score: str = ""
    limits: bool = True

    @property
    def summary(self) -> str:
        """The first line of the rule's file."""
        return first_line(self.share, self.name)

    def why_not(self, method: Method) -> str:
        """Why a method cannot be shared out by this rule; '' where it can."""
        if method.options is low_rank_options:
            return ""
        return (
            f"allocation: {self.name} reads the singular values that plain low-rank factors keep, and {method.name} stores "
            "something else; use kl, spectrum or uniform"
        )


_RULES: dict[str, Rule] = {}


def rule(
    name: str,
    *,
    source: str,
    settings: type[Settings] = Settings,
    needs: frozenset[str] = frozenset(),
    score: str = "",
    limits: bool = True,
) -> Callable[[Share], Share]:
    """Register a function as the rule `name`."""

    def register(share: Share) -> Share:
        _RULES[name] = Rule(name, share, settings, source, needs, score, limits)
        return share

    return register


def rules() -> dict[str, Rule]:
    """All rules by name: every module of this package registers its own on import."""
    import_all(__package__ or "lrc.plan.rules")
    return dict(sorted(_RULES.items()))


def in_proportion(
    weights: Mapping[str, float], low: Mapping[str, float], high: Mapping[str, float], total: float
) -> dict[str, float]:
    """Sizes in proportion to weights, each between its bounds, that add up to `total`.

    What a target cannot take goes to the others: size = min(high, max(low, λ · weight)), λ found by bisection.

    Args:
        weights: positive or zero.
        low, high: bounds; `total` should lie between their sums (nearer to it than the bounds allow is not possible).
    """

    def at(scale: float) -> dict[str, float]:
        return {name: min(high[name], max(low[name], scale * weight)) for name, weight in weights.items()}

    positive = [name for name, weight in weights.items() if weight > 0]
    if not positive:
        return at(0.0)
    bottom, top = 0.0, max(high[name] / weights[name] for name in positive)
    for _ in range(200):
        middle = (bottom + top) / 2
        bottom, top = (middle, top) if sum(at(middle).values()) <= total else (bottom, middle)
    return at(bottom)


def error_at(target: Open, kept: float) -> float:
    """Root of the squared output error over all tokens at the uniform share; 0 where that is the dense form."""
    option = target.at(kept * target.dense)
    if option.choice.dense:
        return 0.0
    loss = target.curve.losses[target.curve.options.index(option)]
    return math.sqrt(max(loss, 0.0) * target.curve.scores[1])
