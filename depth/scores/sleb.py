"""SLEB: again and again the layer goes without which the model predicts the calibration text best.

Each round takes out, one at a time, every layer that is left, and measures the mean negative log likelihood; the one that costs
least goes for good. What an early removal does to the worth of later layers is seen, which one look at hidden states cannot.

When to use: wherever a few minutes are to be had; it is the safest of the scores. Cost: rounds × layers forwards over
`loss_samples` × `loss_length` tokens, all variants of a round in one pass over the weights.

Source: Song et al., SLEB, arXiv 2402.09025 (algorithm 1, its third metric, on WikiText-2). First and last layer stay
(`protect_first`, `protect_last`).
"""

from __future__ import annotations

from collections.abc import Sequence

from ..base import Enough, Trial, greedily, score


@score("sleb", source="arXiv 2402.09025", looks="loss")
def choose(trial: Trial, candidates: Sequence[int], enough: Enough) -> list[int]:
    """Greedily by the model's loss, until enough is gone."""
    return greedily(trial, candidates, enough)
