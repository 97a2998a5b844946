"""Sharing the budget out: curves in, one option per target out, by the recipe's rule.

Losses of different targets can be weighed against each other only on a common scale. `spectrum` takes each loss relative to
the target's own output energy; `kl` and `fisher` take losses that are in nats already; `own` asks no solver and takes what
the method itself would choose. Rules with a formula of their own lie in `plan/rules/`. Comparing plain energies across targets
is known to be fatal and is not offered: a target whose outputs are large would take everything (Zero-Sum SVD, arXiv 2602.02848,
ablation: perplexity 32750 against 11.4; docs/allocation.md).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from ..compress.base import Curve
from ..compress.options import Choice, Option
from ..errors import BudgetError
from ..model.targets import Target
from .knapsack import PredictedOption, solve
from .recipe import Recipe
from .rules.base import Open, rules


@dataclass(frozen=True)
class Shared:
    """What every target gets.

    Args:
        options: target -> its option; a dense one has an empty `Choice`.
        gap: how far the predicted loss may be from the best possible, relative to it; None where no solver was asked.
    """

    options: dict[str, Option]
    gap: float | None = None


_SOLVED = {
    "uniform": "The same fraction of every target's bytes.",
    "spectrum": "The solver, with each target's discarded energy relative to that of its outputs.",
    "kl": "The solver, with losses in nats, measured by compressing one target at a time (run/losses/probe.py).",
    "fisher": "The solver, with losses that the method itself gives in nats (kfac).",
    "own": "No budget: what the method's settings ask for.",
}


def described() -> dict[str, str]:
    """Every rule with a line that says what it does."""
    return _SOLVED | {name: f"{each.summary} [{each.source}]" for name, each in rules().items()}


def allocate(
    recipe: Recipe,
    dense: Mapping[str, int],
    curves: Mapping[str, Curve],
    budget: int | None,
    targets: Sequence[Target],
    bounded: frozenset[str] = frozenset(),
) -> Shared:
    """One option per target that has a curve.

    Args:
        recipe: its rule.
        dense: bytes of every target when dense, those that the recipe keeps included.
        curves: of the targets that may be compressed.
        budget: bytes for all of `dense`; may be None where the method decides.
        targets: all of the model, for rules that look at roles and groups, and for what an expert is beside the others.
        bounded: targets whose limits do not leave them dense.

    Raises:
        BudgetError: the budget cannot be met.
    """
    places = {target.name: target for target in targets}
    unseen = {name for name, curve in curves.items() if curve.total <= 0 and places[name].expert is not None}
    if recipe.allocation == "own":
        return Shared({name: _own(name, curve, dense[name], name in unseen) for name, curve in curves.items()})
    if budget is None:
        raise ValueError(f"allocation {recipe.allocation} needs a budget")
    left = budget - sum(nbytes for name, nbytes in dense.items() if name not in curves)
    curves = _as_others(unseen, curves, places)
    if (rule := rules().get(recipe.allocation)) is not None:
        opened = [
            Open(name, places[name].role, places[name].group, dense[name], curve, name not in bounded)
            for name, curve in curves.items()
        ]
        return Shared(rule.share(opened, left, recipe.rule_settings)) if opened else Shared({})
    predicted = {name: _predicted(recipe.allocation, curve, dense[name], name not in bounded) for name, curve in curves.items()}
    found = solve(predicted, left)
    options = {name: Option(one.choice, one.nbytes) for name, one in found.options.items()}
    return Shared(options, found.gap)


def _as_others(unseen: Collection[str], curves: Mapping[str, Curve], places: Mapping[str, Target]) -> dict[str, Curve]:
    """The curves, and for experts that no token reached, whose losses of nought say nothing, the mean of the others of their
    layer and role."""
    kinds = {
        name: (places[name].layer, places[name].role, curve.options)
        for name, curve in curves.items()
        if places[name].expert is not None
    }
    seen: dict[tuple[int, str, tuple[Option, ...]], list[Curve]] = {}
    for name, kind in kinds.items():
        if name not in unseen:
            seen.setdefault(kind, []).append(curves[name])
    return {**curves, **{name: _mean(curves[name], seen[kinds[name]]) for name in unseen if kinds[name] in seen}}


def _mean(curve: Curve, others: Sequence[Curve]) -> Curve:
    def over(each: Iterable[Sequence[float]]) -> tuple[float, ...]:
        return tuple(map(fmean, zip(*each, strict=True)))

    losses, scores = over(other.losses for other in others), over(other.scores for other in others)
    return replace(curve, total=fmean(other.total for other in others), losses=losses, scores=scores)


def _own(name: str, curve: Curve, dense: int, unseen: bool) -> Option:
    """What the method would choose, its rank rounded up to one that is offered; dense where no such one is smaller, or where
    calibration has seen nothing to choose by."""
    if curve.preferred is None:
        raise BudgetError(f"{name}: the method leaves the size to the budget.", "Use another allocation than 'own'.")
    wish = curve.preferred.rank
    if wish is not None and not unseen:
        for option in curve.options:
            if option.choice.rank is not None and option.choice.rank >= wish:
                return option
    return Option(Choice(), dense)


def _predicted(rule: str, curve: Curve, dense: int, may_be_dense: bool = True) -> list[PredictedOption]:
    scale = 1 / curve.total if rule == "spectrum" and curve.total > 0 else 1.0
    ways = [
        PredictedOption(option.choice, option.nbytes, scale * loss)
        for option, loss in zip(curve.options, curve.losses, strict=True)
    ]
    return [*ways, PredictedOption(Choice(), dense, 0.0)] if may_be_dense else ways
