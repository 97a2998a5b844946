"""ASVD: singular value decomposition after scaling each input channel by its mean magnitude.

Input channels with large activations get a larger weight: the method decomposes W S with S = diag((E|x|)^alpha), then divides
S out of the right factor. A diagonal approximates the full gram, so the result is not optimal for the data (`svd-llm` is), but
the statistics are only one vector per group.

When to use: where memory for grams is short, or to compare with published ASVD results.

Cost: one SVD per target; statistics: (in,) per group.

Source: Yuan et al., ASVD, arXiv 2312.05821, eq. 4-6 with alpha = 0.5. Differences from the authors' code: a channel that is
always zero is scaled by the smallest positive magnitude instead of 1e-6 (its column of the right factor stays finite), and a
failed decomposition is an error instead of a randomly initialised layer.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from ..base import Factored, Settings, TargetStats, method
from .svd import scaled_svd


class AsvdSettings(Settings):
    """Settings of `asvd`."""

    alpha: float = Field(0.5, ge=0, le=2, description="power of the mean magnitude; 0 is plain SVD")


@method("asvd", source="arXiv 2312.05821", needs=["abs_mean"], settings=AsvdSettings)
def solve(weight: Tensor, stats: TargetStats, settings: AsvdSettings) -> Factored:
    """Truncated SVD of W S (out, in); energies are squared singular values, errors in the scaled metric."""
    assert stats.group.abs_mean is not None
    return scaled_svd(weight, stats.group.abs_mean.double() ** settings.alpha)
