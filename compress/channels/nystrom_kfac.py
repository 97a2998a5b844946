"""`nystrom` in the metric of gradients: what the loss does not feel goes first; attention by `kfac`.

A feed-forward loses channels as with `nystrom`, but in the order of what their absence costs the loss and not the output: an
error e of the output counts ½ eᵀ G e, G the mean over tokens of the outer product of the output's gradients. The reader's fit
to the channels that stay is the same for every G. Attention's matrices are projected in the two-sided metric.

When to use: where a backward pass can be paid for, with `allocation: kl`: of the one-shot methods here it loses least, most of
all on text that calibration never saw (docs/allocation.md).

Cost: as `nystrom` and `kfac`, beside the backward pass. Statistics: per feed-forward a gram (inner, inner) and the gradients'
gram (out, out) of what reads it; of the others as `kfac`.

Source: the two sides are those of `kfac` (KFAC-SVD in LEMS, ICML 2026, OpenReview IjIgNPFuCt), the elimination is that of
`nystrom`; to weigh its outputs by their gradients is lrc's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..base import Joint, Solution, TargetStats, method
from ..low_rank import kfac
from . import nystrom
from .feed_forward import GATE_UP, MAKER, READER

_READ = {GATE_UP: frozenset[str](), MAKER: frozenset[str](), READER: frozenset({"gram", "grad_gram"})}


class NystromKfacSettings(kfac.KfacSettings, nystrom.NystromSettings):
    """Settings of `nystrom-kfac`: those of both."""


def solve_set(
    weights: Sequence[Tensor], statistics: Sequence[TargetStats], parts: Sequence[str], settings: NystromKfacSettings
) -> Sequence[Solution]:
    """A feed-forward's weights (out, in), the one that reads the channels last; losses are in nats per token."""
    grad_gram = statistics[-1].grad_gram
    assert grad_gram is not None
    outputs = kfac.output_metric(grad_gram, settings.shrink_grad).root() / math.sqrt(2)
    return nystrom.solved_feed_forward(weights, statistics[-1], settings.ridge, outputs)


@method(
    "nystrom-kfac",
    source="OpenReview IjIgNPFuCt",
    needs=["gram", "grad_gram"],
    settings=NystromKfacSettings,
    joint=Joint(nystrom.sets, nystrom.options, solve_set, shares=False, needs=_READ),
)
def solve(weight: Tensor, stats: TargetStats, settings: NystromKfacSettings) -> Solution:
    """A target (out, in) by itself: as `kfac`."""
    return kfac.solve(weight, stats, settings)
