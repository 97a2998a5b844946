"""QERA, approximate: a low-rank correction of the rounding error, with each input channel scaled by its root mean square.

W ≈ Q + L R with L R = SVD_k((W - Q) S) S⁻¹, S = diag(√E[x²]): the correction of rank k with the least output error if the input
channels are uncorrelated.

When to use: where memory for grams is short; `qera` is exact and costs a gram per group.

Cost: one SVD per target; statistics: (in,) per group.

Source: Zhang et al., QERA, arXiv 2410.06040, theorem 2. Difference from the authors' code: a channel that is always zero
gets the smallest positive scale, so that nothing is divided by zero.
"""

from __future__ import annotations

from torch import Tensor

from ..base import TargetStats, method
from .corrections import Corrected, CorrectionSettings, corrected_by_channel, correction_options, positive


@method(
    "qera-approx", source="arXiv 2410.06040", needs=["mean_square"], settings=CorrectionSettings, options=correction_options
)
def solve(weight: Tensor, stats: TargetStats, settings: CorrectionSettings) -> Corrected:
    """The rounded weight (out, in) and the scaled SVD of its error; losses are output errors if inputs are uncorrelated."""
    assert stats.group.mean_square is not None
    return corrected_by_channel(weight, settings, positive(stats.group.mean_square).sqrt())
