"""Log loss: within each role, targets give up bytes in proportion to the inverse logarithm of their loss.

A target of a role with n members gives up the fraction n · R · L / ΣL of its bytes, with L = 1 / log(ε), ε the root of the
squared output error over all calibration tokens at the uniform ratio R.

When to use: to compare with SVD-LLM v2. Cost: no more than the method itself.

Source: SVD-LLM v2, arXiv 2503.12340. Differences: losses below e count as e, because their logarithm is below 1 or negative. A
fraction outside the bounds of the target's forms is clipped, and the other targets of the role take the difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...compress.base import Settings
from ...compress.options import Option
from ...errors import BudgetError
from .base import Open, error_at, in_proportion, rule


@rule("log-loss", source="arXiv 2503.12340", score="tokens")
def share(targets: Sequence[Open], budget: int, settings: Settings) -> dict[str, Option]:
    """Per role: bytes removed in proportion to 1 / log(loss)."""
    kept = budget / sum(target.dense for target in targets)
    roles: dict[str, list[Open]] = {}
    for target in targets:
        roles.setdefault(target.role, []).append(target)
    found: dict[str, Option] = {}
    for members in roles.values():
        weights = {target.name: target.dense / math.log(max(math.e, error_at(target, kept))) for target in members}
        removed = (1 - kept) * sum(target.dense for target in members)
        low = {target.name: float(target.dense - target.most) for target in members}
        high = {target.name: float(target.dense - target.least) for target in members}
        if sum(high.values()) < removed * (1 - 1e-12):
            raise BudgetError(
                f"The budget removes {int(removed):,} bytes from all {members[0].role}; their smallest forms save only "
                f"{int(sum(high.values())):,}.",
                "Raise the budget.",
            )
        gone = in_proportion(weights, low, high, removed)
        found |= {target.name: target.at(target.dense - gone[target.name]) for target in members}
    return found
