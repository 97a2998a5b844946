"""Sharing the budget out: curves in, one offer per target out, by the recipe's rule.

Losses of different targets can be weighed against each other only on a common scale. `spectrum` takes each loss relative to
the target's own output energy; `kl` and `fisher` take losses that are in nats already; `own` asks no solver and takes what
the method itself would choose. Comparing plain energies across targets is known to be fatal and is not offered: a target whose
outputs are large would take everything (Zero-Sum SVD, arXiv 2602.02848, ablation: perplexity 32750 against 11.4).
"""

from __future__ import annotations

from collections.abc import Mapping

from .budget import Option, require_ratio, solve
from .compress.base import Choice, Curve, Offer
from .errors import BudgetError
from .recipe import Recipe


def allocate(recipe: Recipe, dense: Mapping[str, int], curves: Mapping[str, Curve]) -> dict[str, Offer]:
    """One offer per target that has a curve.

    Args:
        recipe: its ratio and its rule.
        dense: bytes of every target when dense, those that the recipe keeps included.
        curves: of the targets that may be compressed.

    Raises:
        BudgetError: no ratio where the rule needs one, or one that cannot be reached.
    """
    if recipe.allocation == "own":
        return {name: _own(name, curve, dense[name]) for name, curve in curves.items()}
    if recipe.ratio is None:
        raise BudgetError(
            "How much should go? The recipe names no ratio.", "Add --ratio 0.2 (removes 20 % of the targets' bytes)."
        )
    require_ratio(recipe.ratio)
    options = {name: _options(recipe.allocation, curve, dense[name]) for name, curve in curves.items()}
    kept = sum(nbytes for name, nbytes in dense.items() if name not in curves)
    budget = int((1 - recipe.ratio) * sum(dense.values()) + 1e-6) - kept
    found = solve(options, budget)
    return {name: Offer(option.choice, option.nbytes) for name, option in found.options.items()}


def _own(name: str, curve: Curve, dense: int) -> Offer:
    if curve.preferred is None:
        raise BudgetError(f"{name}: the method leaves the size to the budget.", "Use another allocation than 'own'.")
    for offer in curve.offers:
        if offer.choice == curve.preferred:
            return offer
    return Offer(Choice(), dense)


def _options(rule: str, curve: Curve, dense: int) -> list[Option]:
    scale = 1 / curve.total if rule == "spectrum" and curve.total > 0 else 1.0
    ways = [Option(offer.choice, offer.nbytes, scale * loss) for offer, loss in zip(curve.offers, curve.losses, strict=True)]
    return [*ways, Option(Choice(), dense, 0.0)]
