"""ZeroQuant-V2: a quantized weight and a correction of very low rank in 8 bit, without calibration data.

W ≈ Q + L R with Q the weight rounded to nearest and L R the truncated SVD of W - Q. By default L R has eight components in
8 bit: some hundredths of a bit per weight.

When to use: to compare with published results, or where there is no calibration data and every byte counts.

Cost: one SVD per target. Needs no statistics.

Source: Yao et al., ZeroQuant-V2, arXiv 2303.08302, §5 (low-rank compensation, rank 8, factors in 8 bit). It is `lqer` with
other defaults. Differences from the paper: the singular values are in the right factor alone, whose rows have steps of their
own, and the left factor is refitted to it after rounding (factors.py).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from ..base import TargetStats, method
from .corrections import Corrected, CorrectionSettings, corrected_by_channel, correction_options


class ZeroQuantSettings(CorrectionSettings):
    """Settings of `zeroquant-v2`."""

    rank: int | None = Field(8, ge=0, description="rank of the correction; null: as large as the budget allows")
    factor_bits: Literal[16, 8, 4] = Field(8, description="bits of the factors; 16: stored in the checkpoint's own dtype")


@method("zeroquant-v2", source="arXiv 2303.08302", settings=ZeroQuantSettings, options=correction_options)
def solve(weight: Tensor, stats: TargetStats, settings: ZeroQuantSettings) -> Corrected:
    """The rounded weight (out, in) and the truncated SVD of its error; losses are squared errors of the weight."""
    return corrected_by_channel(weight, settings, None)
