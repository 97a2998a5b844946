"""Allocation: loss curves in, one option per unit out, by the recipe's rule.

Losses of different units are comparable only on a common scale. `spectrum` divides each loss by the output energy of its own
unit; `kl` and `fisher` use losses in nats; `own` needs no solver and takes the size that the method itself prefers.
`plan/rules/` holds the rules with a formula of their own. No rule compares plain energies across targets, because targets with
large outputs would take nearly the whole budget (Zero-Sum SVD, arXiv 2602.02848, ablation: perplexity 32750 against 11.4;
docs/allocation.md).
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
    """The result of an allocation.

    Args:
        options: unit -> its option; a dense one has an empty `Choice`.
        gap: upper bound on the relative distance of the predicted loss from the best possible one; None without a solver.
    """

    options: dict[str, Option]
    gap: float | None = None


_SOLVED = {
    "uniform": "Removes the same fraction of every target's bytes.",
    "spectrum": "The solver, with each target's discarded energy relative to its output energy.",
    "kl": "The solver, with losses in nats, measured by compressing one target at a time (run/losses/probe.py).",
    "fisher": "The solver, with losses in nats that the method itself predicts (kfac).",
    "own": "No budget: the method's settings determine every size.",
}


def described() -> dict[str, str]:
    """One line of description for every rule, by name."""
    return _SOLVED | {name: f"{each.summary} [{each.source}]" for name, each in rules().items()}


def allocate(
    recipe: Recipe,
    dense: Mapping[str, int],
    curves: Mapping[str, Curve],
    budget: int | None,
    targets: Sequence[Target],
    bounded: frozenset[str] = frozenset(),
) -> Shared:
    """Choose one option for every unit that has a loss curve.

    Args:
        recipe: gives the rule and its settings.
        dense: dense bytes of every unit, and of every target outside the units.
        curves: loss curves of the units, which may be compressed.
        budget: bytes for everything in `dense`; may be None if the method decides.
        targets: all targets of the model, for their layers, roles, groups and experts.
        bounded: units that may not stay dense because of their limits.

    Raises:
        BudgetError: the budget cannot be met.
        ValueError: the rule needs a budget and there is none.
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
    """Replace the curves of experts that no token reached by the mean curve of the other experts of their layer and role.

    The losses of an expert without tokens are zero and say nothing about it.
    """
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
    """The option that the method prefers, with its rank rounded up to an available one.

    The unit stays dense if the method prefers that, if no available rank is large enough, or if calibration gave it no tokens.
    """
    if curve.preferred is None:
        raise BudgetError(f"{name}: the method leaves the size to the budget.", "Use an allocation other than 'own'.")
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
