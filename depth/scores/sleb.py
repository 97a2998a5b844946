"""SLEB: in each round the layer without which the model predicts the calibration text best is dropped.

Each round removes every remaining layer, one at a time, and measures the mean negative log likelihood; the layer whose removal
raises it least is dropped. So the score sees how an early removal changes the importance of later layers, which a single
comparison of hidden states cannot.

When to use: wherever there are a few minutes; it is the safest of the scores. Cost: rounds × layers forwards over
`loss_samples` × `loss_length` tokens, all ablations of a round in one pass over the weights.

Source: Song et al., SLEB, arXiv 2402.09025 (algorithm 1, its third metric, on WikiText-2). The first and the last layer are
protected (`protect_first`, `protect_last`).
"""

from __future__ import annotations

from collections.abc import Sequence

from ..base import Enough, Trial, greedily, score


@score("sleb", source="arXiv 2402.09025", looks="loss")
def choose(trial: Trial, candidates: Sequence[int], enough: Enough) -> list[int]:
    """Greedily by the model's loss, until enough is gone."""
    return greedily(trial, candidates, enough)
