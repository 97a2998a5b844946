"""Importance: targets get more bytes in layers that rotate the hidden state more, and if they lose more at the mean rank.

Within each role, a target has the score s = β^α · (log(e + ε))^(1-α): β in [1, 2] is its layer's angular importance (the mean
angle between the hidden states before and after it, scaled from the least to the greatest layer), ε the root of the squared
error of its outputs over all calibration tokens at the uniform rank. Every target gets half of its uniform share; the rule
shares out the remaining bytes of the role in proportion to the scores.

When to use: to compare with Swift-SVD*; it needs one forward pass and the hidden states of a few samples.

Source: Swift-SVD*, arXiv 2604.01609. Differences: the authors choose α from eleven values by the perplexity of eleven whole
models on the test text; here α is a setting. A target stays dense if its share reaches its dense size. The authors' code
computes log(1 + ε), the paper says log(e + ε); this rule follows the paper.
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
        alpha: weight of the layer's importance against the target's own loss, 0 to 1.
        floor: fraction of the uniform share that every target gets at least.
    """

    alpha: float = Field(0.5, ge=0, le=1)
    floor: float = Field(0.5, ge=0, le=1)


@rule("importance", source="arXiv 2604.01609", settings=ImportanceSettings, score="angular")
def share(targets: Sequence[Open], budget: int, settings: ImportanceSettings) -> dict[str, Option]:
    """Per role: give every target its floor, and share out the other bytes in proportion to the scores."""
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
        # every target gets its floor and pool · s / Σs, at most its largest form
        pool = (1 - settings.floor) * kept * sum(target.dense for target in members)
        floors = {target.name: settings.floor * kept * target.dense for target in members}
        low = {target.name: max(0.0, target.least - floors[target.name]) for target in members}
        high = {target.name: max(low[target.name], target.most - floors[target.name]) for target in members}
        if sum(low.values()) > pool * (1 + 1e-12):
            least = sum(target.least for target in members)
            raise BudgetError(
                f"The budget allows {int(kept * sum(target.dense for target in members)):,} bytes for all {members[0].role}; "
                f"their smallest forms come to {least:,}.",
                "Raise the budget.",
            )
        parts = in_proportion(scores, low, high, pool)
        found |= {target.name: target.at(floors[target.name] + parts[target.name]) for target in members}
    return found
