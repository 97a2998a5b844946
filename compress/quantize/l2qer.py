"""L²QER: a low-rank correction of the rounding error, with each input channel scaled by its mean magnitude.

W ≈ Q + L R with L R = SVD_k((W - Q) S) S⁻¹, S a diagonal of the channels' mean magnitudes: for each channel the largest mean of
any calibration sample, divided by the geometric mean of the smallest and the largest channel's value.

When to use: to compare with published results. `qera-approx` costs the same and its scale is derived; `qera` is exact.

Cost: one SVD per target; statistics: (in,) per group.

Source: Zhang et al., LQER, arXiv 2402.02446, §3.2 (eq. 12 to 14). Differences from the authors' code: the largest mean
is taken over samples, not over batches, so that it does not depend on how samples are batched (for an expert, whose tokens
cannot be assigned to samples, it is taken over batches); a channel that is always zero gets the smallest positive scale instead
of 1e-4; bits are counted per number of the original weight.
"""

from __future__ import annotations

from torch import Tensor

from ..base import TargetStats, method
from .corrections import Corrected, CorrectionSettings, corrected_by_channel, correction_options, positive


@method("l2qer", source="arXiv 2402.02446", needs=["peak_abs_mean"], settings=CorrectionSettings, options=correction_options)
def solve(weight: Tensor, stats: TargetStats, settings: CorrectionSettings) -> Corrected:
    """The rounded weight (out, in) and the scaled SVD of its error; losses are errors in the scaled metric."""
    assert stats.group.peak_abs_mean is not None
    magnitude = positive(stats.group.peak_abs_mean)
    return corrected_by_channel(weight, settings, magnitude / (magnitude.min() * magnitude.max()).sqrt())
