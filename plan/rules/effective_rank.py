"""Effective rank: a target gets a higher rank if its outputs have a higher effective rank.

The effective rank of a spectrum is R = exp(H(p)) with p_i = σ_i² / Σσ²: the number of equal singular values with the same
entropy. Minimising Σ R / k under Σ ω k = budget (ω: bytes of one rank) gives k ∝ √(R / ω). The rule then moves a part of the
bytes of q and k to v, because the outputs of v carry the values themselves.

When to use: to compare with D-Rank; it needs one forward pass and no probe. Cost: no more than the method itself.

Source: D-Rank, arXiv 2509.25622. Differences: the authors share one basis between layers; here each target has factors of its
own. A target stays dense if its rank would save no bytes, and the other targets get its surplus. The rule moves bytes (the
fraction β of those of q and k), not ranks, so that it meets the budget even if k and v are narrower than q.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field

from ...compress.base import Settings
from ...compress.options import Option
from ...errors import BudgetError
from .base import Open, in_proportion, rule


class EffectiveRankSettings(Settings):
    """Settings of `effective-rank`.

    Args:
        qk_to_v: fraction of the bytes of q and k to move to v (0.3 to 0.4 in the paper); 0 moves none.
    """

    qk_to_v: float = Field(0.3, ge=0, lt=1)


@rule("effective-rank", source="arXiv 2509.25622", settings=EffectiveRankSettings, score="effective-rank")
def share(targets: Sequence[Open], budget: int, settings: EffectiveRankSettings) -> dict[str, Option]:
    """Give each target bytes ω k ∝ √(R ω), the dense form from break-even on; then move bytes from q and k to v."""
    weights = {}
    for target in targets:
        ranked = next((option for option in target.curve.options if option.choice.rank), None)
        per_rank = ranked.nbytes / (ranked.choice.rank or 1) if ranked else target.dense
        weights[target.name] = math.sqrt(target.curve.scores[0] * per_rank)
    low, high = {t.name: float(t.least) for t in targets}, {t.name: float(t.most) for t in targets}
    if (least := sum(low.values())) > budget:
        raise BudgetError(
            f"The budget allows {budget:,} bytes; the smallest forms come to {int(least):,}.", "Raise the budget."
        )
    sizes = in_proportion(weights, low, high, budget)
    if settings.qk_to_v:
        _move(targets, sizes, settings.qk_to_v, low, high)
    return {target.name: target.at(sizes[target.name]) for target in targets}


def _move(targets: Sequence[Open], sizes: dict[str, float], part: float, low: dict[str, float], high: dict[str, float]) -> None:
    """Move bytes within every group of three targets with the same input: from the first two (q, k) to the third (v)."""
    groups: dict[str, list[Open]] = {}
    for target in targets:
        groups.setdefault(target.group, []).append(target)
    threes = [members for members in groups.values() if len(members) == 3]
    if not threes:
        raise BudgetError(
            "allocation: effective-rank moves ranks from q and k to v, and no three open targets share one input.",
            "If q, k and v are fused or kept dense, add --set allocation_settings.qk_to_v=0.",
        )
    for query, key, value in threes:
        room = high[value.name] - sizes[value.name]
        wanted = {each.name: min(part * sizes[each.name], sizes[each.name] - low[each.name]) for each in (query, key)}
        taken = min(1.0, room / sum(wanted.values())) if sum(wanted.values()) > 0 else 0.0
        for name, nbytes in wanted.items():
            sizes[name] -= taken * nbytes
            sizes[value.name] += taken * nbytes
