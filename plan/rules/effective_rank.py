"""Effective rank: the more directions a target's outputs really use, the higher its rank.

The effective rank of a spectrum is R = exp(H(p)), p_i = σ_i² / Σσ², the number of equal singular values that would have the
same entropy. Minimising Σ R / k under Σ ω k = budget (ω: bytes of one rank) gives k ∝ √(R / ω). Afterwards a part of the ranks
of q and k goes to v, whose outputs carry the values themselves.

When to use: to compare with D-Rank; one forward pass, no probe. Cost: that of the method alone.

Source: D-Rank, arXiv 2509.25622. Differences: the authors share one basis between layers and stop there; here each target has
factors of its own, a target whose rank would save nothing stays dense and leaves its surplus to the others, and bytes are
moved (β of those of q and k), so that the budget holds where k and v are narrower than q.
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
        qk_to_v: part of the bytes of q and k that goes to v (0.3 to 0.4 in the paper); 0 moves nothing.
    """

    qk_to_v: float = Field(0.3, ge=0, lt=1)


@rule("effective-rank", source="arXiv 2509.25622", settings=EffectiveRankSettings, score="effective-rank")
def share(targets: Sequence[Open], budget: int, settings: EffectiveRankSettings) -> dict[str, Option]:
    """Bytes ω k ∝ √(R ω), dense from break-even on; then from q and k to v."""
    weights = {}
    for target in targets:
        ranked = next((option for option in target.curve.options if option.choice.rank), None)
        per_rank = ranked.nbytes / (ranked.choice.rank or 1) if ranked else target.dense
        weights[target.name] = math.sqrt(target.curve.scores[0] * per_rank)
    low, high = {t.name: float(t.least) for t in targets}, {t.name: float(t.most) for t in targets}
    if (least := sum(low.values())) > budget:
        raise BudgetError(f"The budget allows {budget:,} bytes; the smallest forms come to {int(least):,}.", "Ask for more.")
    sizes = in_proportion(weights, low, high, budget)
    if settings.qk_to_v:
        _move(targets, sizes, settings.qk_to_v, low, high)
    return {target.name: target.at(sizes[target.name]) for target in targets}


def _move(targets: Sequence[Open], sizes: dict[str, float], part: float, low: dict[str, float], high: dict[str, float]) -> None:
    """Move bytes inside every group of three that read one input: from the first two (q, k) to the third (v)."""
    groups: dict[str, list[Open]] = {}
    for target in targets:
        groups.setdefault(target.group, []).append(target)
    threes = [members for members in groups.values() if len(members) == 3]
    if not threes:
        raise BudgetError(
            "allocation: effective-rank moves ranks from q and k to v, and no three targets of this model read one input.",
            "Where they are fused or kept, add --set allocation_settings.qk_to_v=0.",
        )
    for query, key, value in threes:
        room = high[value.name] - sizes[value.name]
        wanted = {each.name: min(part * sizes[each.name], sizes[each.name] - low[each.name]) for each in (query, key)}
        taken = min(1.0, room / sum(wanted.values())) if sum(wanted.values()) > 0 else 0.0
        for name, nbytes in wanted.items():
            sizes[name] -= taken * nbytes
            sizes[value.name] += taken * nbytes
