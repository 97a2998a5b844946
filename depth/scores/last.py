"""The last layers are dropped: no measurement at all.

When to use: with fine-tuning of the norm, the head and the remaining last layers (`partial-finetune`), a combination that was
published as hard to beat. Without fine-tuning the damage is large. Cost: nothing.

Source: Lu et al., Reassessing Layer Pruning in LLMs, arXiv 2411.15558.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..base import score


@score("last", source="arXiv 2411.15558", looks="", one_run=True)
def choose(boundaries: Sequence[Tensor], candidates: Sequence[int], count: int) -> list[int]:
    """The last `count` candidates."""
    return sorted(candidates)[-count:]
