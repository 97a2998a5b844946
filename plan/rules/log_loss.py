"""Log loss: within each role, targets that lose more give up less, by the inverse logarithm of the loss.

A target of a role with n members loses the fraction n · R · L / ΣL of its bytes, with L = 1 / log(ε), ε the root of the squared
output error over all calibration tokens at the uniform ratio R.

When to use: to compare with SVD-LLM v2. Cost: that of the method alone.

Source: SVD-LLM v2, arXiv 2503.12340. Differences: losses of at most e (whose logarithm is no scale any more) count as e; a
fraction below 0 or with no form is cut at the bounds and what is cut is shared among the others.
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
                f"{int(removed):,} bytes of all {members[0].role} should go, and their smallest forms save "
                f"{int(sum(high.values())):,}.",
                "Ask for more.",
            )
        gone = in_proportion(weights, low, high, removed)
        found |= {target.name: target.at(target.dense - gone[target.name]) for target in members}
    return found
