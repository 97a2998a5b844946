"""Zero-sum: singular values go so that the first-order changes of the loss they cause cancel each other.

Dropping component i of a target changes the loss by ΔL_i = -σ_i u_iᵀ (∂L/∂W) v_i to first order. Every target gives up its
components from the smallest on; which target's turn it is, the running sum decides: it takes, of the next components of all
targets, the one with the smallest |ΔL| whose sign brings the sum back to zero. It ends when the bytes fit. A target that
still holds more ranks than save anything then stays dense.

When to use: to compare with Zero-Sum SVD; one forward and one backward pass, no probe. Only the mean gradient is needed, of the
text's own next tokens (`gradients: {labels: data}`): labels drawn from the model have a mean gradient of zero.

Cost: beside the method's, 4 bytes per weight on disk for the mean gradient, and both factors of every target once.

Source: Zero-Sum SVD, arXiv 2602.02848. Differences: the budget is met in bytes as they will be stored (a target past break-even
counts as dense while components are taken, not afterwards); the gradient is the mean over all samples, where the authors'
script takes one; no correction steps.
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
        floor: part of the break-even rank that every target keeps (0.3 at 60 % in the authors' script).
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
    """One heap of next components for each sign; `scores` are ΔL_i in nats per token, in descending order of σ."""
    by_rank = {target.name: {option.choice.rank: option for option in target.curve.options} for target in targets}
    floors = {target.name: _floor(target, settings.floor) for target in targets}
    known = {target.name: target for target in targets}
    left = {target.name: len(target.curve.scores) for target in targets}
    held = {target.name: Option(Choice(), target.dense) for target in targets}
    total = sum(target.dense for target in targets)
    heaps: tuple[list[tuple[float, str]], list[tuple[float, str]]] = ([], [])  # lowering the loss, raising it

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
                "Ask for more, or lower allocation_settings.floor.",
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
    """The rank that a target keeps at least: that of its smallest option, or the part of its largest one's."""
    ranks = [option.choice.rank for option in target.curve.options if option.choice.rank is not None]
    if not ranks:
        return len(target.curve.scores)
    return next(rank for rank in ranks if rank >= part * ranks[-1])
