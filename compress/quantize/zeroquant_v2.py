"""ZeroQuant-V2: a quantized weight and a correction of very low rank in 8 bit, blind to the data.

W ≈ Q + L R with Q the weight rounded to nearest and L R the truncated SVD of W - Q, eight components in 8 bit by default: some
hundredths of a bit per weight.

When to use: to compare with published results, or where no calibration data can be had and every byte counts.

Cost: one SVD per target. Needs no statistics.

Source: Yao et al., ZeroQuant-V2, arXiv 2303.08302, §5 (low-rank compensation, rank 8, factors in 8 bit). It is `lqer` with
other defaults. Differences from the paper: the components' sizes stand in the right factor alone, whose rows have steps of
their own, and the left one is fitted to it after rounding (compress/quantize/factors.py).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from ..base import TargetStats, method
from .corrections import Corrected, CorrectionSettings, corrected_by_channel, correction_options


class ZeroQuantSettings(CorrectionSettings):
    """Settings of `zeroquant-v2`."""

    rank: int | None = Field(8, ge=0, description="of the correction; null: as large as the budget allows")
    factor_bits: Literal[16, 8, 4] = Field(8, description="of the factors; 16: in the checkpoint's own dtype")


@method("zeroquant-v2", source="arXiv 2303.08302", settings=ZeroQuantSettings, options=correction_options)
def solve(weight: Tensor, stats: TargetStats, settings: ZeroQuantSettings) -> Corrected:
    """The rounded weight (out, in) and the truncated SVD of its error; losses are squared errors of the weight."""
    return corrected_by_channel(weight, settings, None)
