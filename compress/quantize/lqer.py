"""LQER: a low-rank correction of the rounding error by its truncated SVD, without calibration data.

W ≈ Q + L R with Q the weight rounded to nearest and L R the truncated SVD of W - Q. The rounding error is noise with a flat
spectrum, so a small rank corrects little of it; `l2qer` and `qera` decompose the effect of the error on the outputs instead.

When to use: without calibration data, or to measure what the other corrections gain.

Cost: one SVD per target. Needs no statistics. The paper's W4A8 is measured with `lrc eval OUT --activations mxint8`, an option
of `lrc sweep` too, which rounds the input of every matrix.

Source: Zhang et al., LQER, arXiv 2402.02446, §3.1 (4-bit MXINT in blocks of 16, factors in 8-bit MXINT, rank 32). Differences
from the authors' code: bits are counted per number of the original weight (theirs count the factors' numbers in the divisor
too); 8-bit factors are refitted to each other after rounding (factors.py).
"""

from __future__ import annotations

from torch import Tensor

from ..base import TargetStats, method
from .corrections import Corrected, CorrectionSettings, corrected_by_channel, correction_options


@method("lqer", source="arXiv 2402.02446", settings=CorrectionSettings, options=correction_options)
def solve(weight: Tensor, stats: TargetStats, settings: CorrectionSettings) -> Corrected:
    """The rounded weight (out, in) and the truncated SVD of its error; losses are squared errors of the weight."""
    return corrected_by_channel(weight, settings, None)
