"""The budget: options with cost and predicted loss in, one choice per target out.

Today the budget is uniform: every target gives up the same share of its bytes, as the papers' one-shot numbers are made.
A solver that weighs targets against each other takes the place of `uniform`; `Option` is its input.

Source of the rank formula: rank = ⌊kept · out · in / (out + in)⌋ from each target's own shape (SVD-LLM arXiv 2403.07378; its
code takes one rank for q, k, v and o, which is wrong where k and v are narrower).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .compress.base import Choice, Offer
from .errors import BudgetError


@dataclass(frozen=True)
class Option:
    """One way to store a target: what it costs in bytes, and the loss that is predicted for it."""

    choice: Choice
    nbytes: int
    loss: float


def require_ratio(ratio: float) -> None:
    """Refuse a ratio outside [0, 1)."""
    if not 0 <= ratio < 1:
        hint = f"Did you mean {ratio / 100:g}?" if 1 < ratio < 100 else "0.4 removes 40 % of the targets' bytes."
        raise BudgetError(f"The ratio must lie in [0, 1), not {ratio:g}.", hint)


def uniform(offers: Mapping[str, tuple[int, Sequence[Offer]]], ratio: float | None) -> dict[str, Offer]:
    """Every target keeps 1 - ratio of its bytes: the largest offer that fits, or dense where that is no saving.

    Args:
        offers: target -> (its bytes when dense, what its method offers, ascending in bytes).
        ratio: fraction of the targets' bytes to remove, 0 <= ratio < 1; 0 keeps everything dense. None takes the only offer
            of methods whose settings fix the size.

    Returns:
        target -> the offer; a dense one has an empty `Choice` and the dense bytes.

    Raises:
        BudgetError: the ratio is out of range, missing, or some target would be left with nothing.
    """
    if ratio is not None:
        require_ratio(ratio)
    chosen: dict[str, Offer] = {}
    starved: list[str] = []
    for name, (dense, ways) in offers.items():
        if ratio is None:
            if len(ways) > 1:
                raise BudgetError(
                    "How much should go? The recipe names no ratio.", "Add --ratio 0.2 (removes 20 % of the targets' bytes)."
                )
            chosen[name] = ways[0] if ways and ways[0].nbytes < dense else Offer(Choice(), dense)
            continue
        # guards against 0.6 * 100 = 59.99999: a rank must not depend on how a decimal is rounded
        allowed = int((1 - ratio) * dense + 1e-6)
        fitting = [way for way in ways if way.nbytes <= allowed]
        if ratio == 0 or not ways:
            chosen[name] = Offer(Choice(), dense)
        elif fitting:
            chosen[name] = fitting[-1]
        else:
            starved.append(f"{name} ({dense:,} bytes)")
    if starved:
        raise BudgetError(
            f"At ratio {ratio:g}, {len(starved)} targets have no form that is small enough, {starved[0]} first.",
            "Lower the ratio or rank_multiple, or keep those targets dense (keep: [PATTERN] in the recipe).",
        )
    return chosen
