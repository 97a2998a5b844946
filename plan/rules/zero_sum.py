"""Zero-sum: removes singular values so that the first-order changes of the loss cancel each other.

Removing component i of a target changes the loss by ΔL_i = -σ_i u_iᵀ (∂L/∂W) v_i to first order. Every target gives up its
components in ascending order of σ. The running sum of ΔL selects the target: among the next components of all targets, the rule
removes the one with the smallest |ΔL| whose sign brings the sum back towards zero. It stops when the bytes meet the budget. A
target then stays dense if its remaining rank would save no bytes.

When to use: to compare with Zero-Sum SVD; it needs one forward and one backward pass and no probe. It reads only the mean
gradient for the text's own next tokens (`gradients: {labels: data}`): labels drawn from the model have a mean gradient of zero.

Cost: in addition to the method's, 4 bytes per weight on disk for the mean gradient, and both factors of every target once.

Source: Zero-Sum SVD, arXiv 2602.02848. Differences: the rule counts bytes as they will be stored (a target past break-even
counts as dense during the removal, not only afterwards); the gradient is the mean over all samples, the authors' script uses
one sample; there are no correction steps.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from pydantic import Field

from ...compress.base import Settings
from ...compress.options import Choice, Option
from ...errors import BudgetError
from .base import Open, rule


class ZeroSumSettings(Settings):
    """Settings of `zero-sum`.

    Args:
        floor: fraction of the break-even rank that every target keeps at least (0.3 at 60 % in the authors' script).
    """

    floor: float = Field(0.0, ge=0, lt=1)


@rule(
    "zero-sum",
    source="arXiv 2602.02848",
    settings=ZeroSumSettings,
    needs=frozenset({"weight_grad"}),
    score="components",
    limits=False,
)
def share(targets: Sequence[Open], budget: int, settings: ZeroSumSettings) -> dict[str, Option]:
    """Keep one heap of next components for each sign of ΔL; `scores` are ΔL_i in nats per token, in descending order of σ."""
    by_rank = {target.name: {option.choice.rank: option for option in target.curve.options} for target in targets}
    floors = {target.name: _floor(target, settings.floor) for target in targets}
    known = {target.name: target for target in targets}
    left = {target.name: len(target.curve.scores) for target in targets}
    held = {target.name: Option(Choice(), target.dense) for target in targets}
    total = sum(target.dense for target in targets)
    heaps: tuple[list[tuple[float, str]], list[tuple[float, str]]] = ([], [])  # ΔL ≤ 0, ΔL > 0

    def option_next(name: str) -> None:
        if left[name] > floors[name]:
            change = known[name].curve.scores[left[name] - 1]
            heapq.heappush(heaps[change > 0], (abs(change), name))

    for name in left:
        option_next(name)
    running = 0.0
    while total > budget:
        wanted = heaps[0] if running >= 0 else heaps[1]
        heap = wanted or heaps[0] or heaps[1]
        if not heap:
            raise BudgetError(
                f"The budget allows {budget:,} bytes; with the smallest ranks all targets come to {total:,}.",
                "Raise the budget, or lower allocation_settings.floor.",
            )
        _, name = heapq.heappop(heap)
        running += known[name].curve.scores[left[name] - 1]
        left[name] -= 1
        if smaller := by_rank[name].get(left[name]):
            total -= held[name].nbytes - smaller.nbytes
            held[name] = smaller
        option_next(name)
    return held


def _floor(target: Open, part: float) -> int:
    """The smallest rank that a target may keep: at least the fraction `part` of its largest option's rank."""
    ranks = [option.choice.rank for option in target.curve.options if option.choice.rank is not None]
    if not ranks:
        return len(target.curve.scores)
    return next(rank for rank in ranks if rank >= part * ranks[-1])
