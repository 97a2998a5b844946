"""`nystrom` in the metric of gradients: prunes the channels that matter least to the loss; attention by `kfac`.

Channels of feed-forwards are pruned as by `nystrom`, but in the order of their effect on the model's loss and not on the
output: an error e of the output counts ½ eᵀ G e, G the mean over tokens of the outer product of the output's gradients. The
refit of the down projection to the kept channels is the same for every G. The matrices of attention are projected in the
two-sided metric.

When to use: where a backward pass is affordable, with `allocation: kl`. Of the one-shot methods here it loses least, above all
on text unlike the calibration text (docs/allocation.md).

Cost: as `nystrom` and `kfac`, plus the backward pass. Statistics: per feed-forward a gram (inner, inner) and the gradients'
gram (out, out) of its down projection; for the other targets as `kfac`.

Source: the two-sided metric is that of `kfac` (KFAC-SVD in LEMS, ICML 2026, OpenReview IjIgNPFuCt), the elimination that of
`nystrom`; weighting its outputs by their gradients is lrc's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..base import Joint, Solution, TargetStats, method
from ..low_rank import kfac
from . import nystrom
from .feed_forward import DOWN, GATE_UP, UP

_READ = {GATE_UP: frozenset[str](), UP: frozenset[str](), DOWN: frozenset({"gram", "grad_gram"})}


class NystromKfacSettings(kfac.KfacSettings, nystrom.NystromSettings):
    """Settings of `nystrom-kfac`: those of both."""


def solve_together(
    weights: Sequence[Tensor], statistics: Sequence[TargetStats], slots: Sequence[str], settings: NystromKfacSettings
) -> Sequence[Solution]:
    """A feed-forward's weights (out, in), the down projection last; losses are in nats per token."""
    grad_gram = statistics[-1].grad_gram
    assert grad_gram is not None
    outputs = kfac.output_metric(grad_gram, settings.shrink_grad).root() / math.sqrt(2)
    return nystrom.solved_feed_forward(weights, statistics[-1], settings.ridge, outputs)


@method(
    "nystrom-kfac",
    source="OpenReview IjIgNPFuCt",
    needs=["gram", "grad_gram"],
    settings=NystromKfacSettings,
    joint=Joint(nystrom.units, nystrom.options, solve_together, shares=False, needs=_READ),
)
def solve(weight: Tensor, stats: TargetStats, settings: NystromKfacSettings) -> Solution:
    """A target (out, in) outside the feed-forwards: as `kfac`."""
    return kfac.solve(weight, stats, settings)
