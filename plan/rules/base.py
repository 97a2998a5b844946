"""Allocation rules with a formula of their own: their interface and their registry.

A rule is one pure function in one file. It receives the measured loss curves of all open targets and the bytes for all of
them, and returns one option per target. Rules that compare losses on one common scale need no file here: they differ only in
the definition of the loss, and the solver does the rest (plan/allocation.py).
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
    """One open target: the budget chooses its option.

    Args:
        name, role, group: as in model.targets.Target.
        dense: its dense bytes.
        curve: its loss at every option, and the scores that the rule needs.
        may_be_dense: whether the limits allow the dense form.
    """

    name: str
    role: str
    group: str
    dense: int
    curve: Curve
    may_be_dense: bool = True

    @property
    def most(self) -> int:
        """Bytes of the largest form that the limits allow."""
        return self.dense if self.may_be_dense or not self.curve.options else self.curve.options[-1].nbytes

    @property
    def least(self) -> int:
        """Bytes of the smallest form."""
        return self.curve.options[0].nbytes if self.curve.options else self.dense

    def at(self, nbytes: float) -> Option:
        """The largest option of at most `nbytes` bytes; the smallest option if all are larger."""
        if nbytes + 1e-6 >= self.dense and self.may_be_dense:
            return Option(Choice(), self.dense)
        fitting = [option for option in self.curve.options if option.nbytes <= nbytes + 1e-6]
        if fitting:
            return fitting[-1]
        return self.curve.options[0] if self.curve.options else Option(Choice(), self.dense)


# (open targets, bytes for all of them, the rule's settings) -> option of each target, by name
Share = Callable[[Sequence[Open], int, Any], dict[str, Option]]
# method -> why its solutions do not say what the rule reads; '' where they do
WhyNot = Callable[[Method], str]


@dataclass(frozen=True)
class Rule:
    """A registered rule.

    Args:
        name: name in recipes (`allocation:`).
        share: the rule's function, see `Share`.
        settings: pydantic class of its settings (`allocation_settings:`).
        source: the paper that describes it.
        needs: statistics that the rule needs in addition to the method's.
        score: scores of each target that the rule needs: 'components', 'effective-rank', 'angular' or 'tokens'
            (run/losses/importance_scores.py).
        limits: whether the rule supports `limits`.
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
        """The first line of the docstring of the rule's file."""
        return first_line(self.share, self.name)

    def why_not(self, method: Method) -> str:
        """Why this rule does not support a method; '' if it does."""
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
    """All rules by name; every module of this package registers its rule on import."""
    import_all(__package__ or "lrc.plan.rules")
    return dict(sorted(_RULES.items()))


def in_proportion(
    weights: Mapping[str, float], low: Mapping[str, float], high: Mapping[str, float], total: float
) -> dict[str, float]:
    """Sizes that are proportional to the weights, lie within their bounds, and add up to `total`.

    The size of a target is min(high, max(low, λ · weight)). Bisection finds λ, so that a size at its bound changes the sizes
    of the others.

    Args:
        weights: weight of each target, zero or positive.
        low, high: bounds of each size.
        total: sum of the sizes; it should lie between the sums of the bounds, otherwise the result only comes close to it.
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
    """Root of the total squared output error over all calibration tokens at the uniform share; 0 for the dense form.

    Args:
        target: its `curve.scores[1]` is the number of tokens.
        kept: the uniform share: fraction of the dense bytes that every target keeps.
    """
    option = target.at(kept * target.dense)
    if option.choice.dense:
        return 0.0
    loss = target.curve.losses[target.curve.options.index(option)]
    return math.sqrt(max(loss, 0.0) * target.curve.scores[1])
