"""The budget: options with cost and predicted loss in, one choice per target out.

Today the budget is uniform: every target gives up the same share of its bytes, as the papers' one-shot numbers are made.
A solver that weighs targets against each other takes the place of `uniform`; `Option` is its input.

Source of the rank formula: rank = ⌊kept · out · in / (out + in)⌋ from each target's own shape (SVD-LLM arXiv 2403.07378; its
code takes one rank for q, k, v and o, which is wrong where k and v are narrower).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .compress.base import Choice
from .errors import BudgetError


@dataclass(frozen=True)
class Option:
    """One way to store a target: what it costs in bytes, and the loss that is predicted for it."""

    choice: Choice
    nbytes: int
    loss: float


def break_even(out_features: int, in_features: int) -> int:
    """The largest rank at which two factors take fewer numbers than the matrix."""
    return (out_features * in_features - 1) // (out_features + in_features)


def low_rank_bytes(out_features: int, in_features: int, rank: int, element: int) -> int:
    """Bytes of two factors of `rank`, `element` bytes a number."""
    return rank * (out_features + in_features) * element


def uniform(shapes: Mapping[str, tuple[int, int]], ratio: float, multiple: int = 1) -> dict[str, Choice]:
    """Every target keeps 1 - ratio of its bytes: its rank from its own shape, or dense where that is no saving.

    Args:
        shapes: target -> (out, in).
        ratio: fraction of the targets' bytes to remove, 0 <= ratio < 1; 0 keeps everything dense.
        multiple: ranks are rounded down to a multiple of this (GPU kernels like 8, 16 or 64).

    Raises:
        BudgetError: the ratio is out of range, or some target would be left with no rank at all.
    """
    if not 0 <= ratio < 1:
        hint = f"Did you mean {ratio / 100:g}?" if 1 < ratio < 100 else "0.4 removes 40 % of the targets' bytes."
        raise BudgetError(f"The ratio must lie in [0, 1), not {ratio:g}.", hint)
    choices: dict[str, Choice] = {}
    starved: list[str] = []
    for name, (out_features, in_features) in shapes.items():
        # guards against 0.6 * 100 = 59.99999: a rank must not depend on how a decimal is rounded
        rank = int((1 - ratio) * out_features * in_features / (out_features + in_features) + 1e-9)
        rank -= rank % multiple
        if ratio == 0 or rank > break_even(out_features, in_features):
            choices[name] = Choice()
        elif rank < 1:
            starved.append(f"{name} ({out_features} x {in_features})")
        else:
            choices[name] = Choice(rank)
    if starved:
        raise BudgetError(
            f"At ratio {ratio:g} with ranks in multiples of {multiple}, {len(starved)} targets have no rank left, "
            f"{starved[0]} first.",
            "Lower the ratio or rank_multiple, or keep those targets dense (keep: [PATTERN] in the recipe).",
        )
    return choices
