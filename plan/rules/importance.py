"""Importance: layers that turn the hidden state much, and targets that lose much at the mean rank, get more.

Within each role, a target has the score s = β^α · (log(e + ε))^(1-α): β in [1, 2] is its layer's angular importance (the mean
angle between the hidden states before and after it, scaled from the least to the greatest layer), ε the root of the squared
error of its outputs over all calibration tokens at the uniform rank. Half of the uniform share is everybody's; the rest of the
role's bytes goes by score.

When to use: to compare with Swift-SVD*; one forward pass and a look at the hidden states of a few samples.

Source: Swift-SVD*, arXiv 2604.01609. Differences: the authors choose α from eleven values by the perplexity of eleven whole
models on the test text; here it is a setting. A target whose share reaches its dense size stays dense. Their code has
log(1 + ε) where the paper has log(e + ε); the paper's is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field

from ...compress.base import Settings
from ...compress.options import Option
from ...errors import BudgetError
from .base import Open, error_at, in_proportion, rule


class ImportanceSettings(Settings):
    """Settings of `importance`.

    Args:
        alpha: weight of the layers' importance against the targets' own losses, 0 to 1.
        floor: part of the uniform share that every target gets.
    """

    alpha: float = Field(0.5, ge=0, le=1)
    floor: float = Field(0.5, ge=0, le=1)


@rule("importance", source="arXiv 2604.01609", settings=ImportanceSettings, score="angular")
def share(targets: Sequence[Open], budget: int, settings: ImportanceSettings) -> dict[str, Option]:
    """Per role: a floor, and the rest in proportion to the score."""
    kept = budget / sum(target.dense for target in targets)
    angles = [target.curve.scores[0] for target in targets]
    span = max(angles) - min(angles)
    roles: dict[str, list[Open]] = {}
    for target in targets:
        roles.setdefault(target.role, []).append(target)
    found: dict[str, Option] = {}
    for members in roles.values():
        scores = {}
        for target in members:
            beta = 1 + (target.curve.scores[0] - min(angles)) / span if span > 0 else 1.0
            scores[target.name] = beta**settings.alpha * math.log(math.e + error_at(target, kept)) ** (1 - settings.alpha)
        # nobody gets less than the floor: pool · s / Σs, the floors added, capped at the largest form
        pool = (1 - settings.floor) * kept * sum(target.dense for target in members)
        floors = {target.name: settings.floor * kept * target.dense for target in members}
        low = {target.name: max(0.0, target.least - floors[target.name]) for target in members}
        high = {target.name: max(low[target.name], target.most - floors[target.name]) for target in members}
        if sum(low.values()) > pool * (1 + 1e-12):
            least = sum(target.least for target in members)
            raise BudgetError(
                f"The budget allows {int(kept * sum(target.dense for target in members)):,} bytes for all {members[0].role}; "
                f"their smallest forms come to {least:,}.",
                "Ask for more.",
            )
        parts = in_proportion(scores, low, high, pool)
        found |= {target.name: target.at(floors[target.name] + parts[target.name]) for target in members}
    return found
