"""FinerCut: in each round the attention or feed-forward whose removal changes the model's predictions least is removed.

Each round removes every remaining candidate, one at a time, and measures the Kullback-Leibler divergence of the predictions
from those of the whole model. No labels are used: the score keeps the model's own behaviour, on any text.

When to use: with `granularity: sub-layer`, where more attentions than feed-forwards can be removed; with whole layers too.
Cost: as `sleb`, with twice as many candidates.

Source: Zhang et al., FinerCut, arXiv 2405.18218 (§3). Of its measures of the outputs' change the authors'
configurations take the Jensen-Shannon divergence; here it is Kullback and Leibler's, in nats, as everywhere in lrc.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..base import Enough, Trial, greedily, score


@score("finercut", source="arXiv 2405.18218", looks="divergence")
def choose(trial: Trial, candidates: Sequence[int], enough: Enough) -> list[int]:
    """Greedily by the divergence of the predictions, until enough is gone."""
    return greedily(trial, candidates, enough)
