"""The last layers are dropped: no measurement at all.

When to use: with fine-tuning of the norm, the head and the remaining last layers (`partial-finetune`), a combination that was
published as hard to beat. Without fine-tuning the damage is large. Cost: nothing.

Source: Lu et al., Reassessing Layer Pruning in LLMs, arXiv 2411.15558.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..base import MayGo, anything, runs, score


@score("last", source="arXiv 2411.15558", looks="", one_run=True)
def choose(boundaries: Sequence[Tensor], candidates: Sequence[int], count: int, may_go: MayGo = anything) -> list[int]:
    """The last `count` candidates; where a model cannot do without them, the last run of so many that can go."""
    first = runs(candidates, count, may_go)[-1]
    return list(range(first, first + count))
