"""ASVD: singular value decomposition after scaling each input channel by its mean magnitude.

Input channels with large activations are made to count more: SVD of W S with S = diag(E|x|^alpha), then S is divided out of
the right factor. A diagonal stands in for the full gram, so the result is not the optimum for the data (that is `svd-llm`), but
the statistics are one vector per group.

When to use: where memory for grams is short, or to compare with published ASVD results.

Cost: one SVD per target; statistics: (in,) per group.

Source: Yuan et al., ASVD, arXiv 2312.05821, eq. 4-6 with alpha = 0.5. Differences from the authors' code: a channel that never
fires is scaled by the smallest positive magnitude instead of 1e-6 (its column stays finite in the right factor), and a failed
decomposition is an error instead of a randomly initialised layer.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from ..base import Factored, Settings, TargetStats, method
from .scaled import scaled_svd


class AsvdSettings(Settings):
    """Settings of `asvd`."""

    alpha: float = Field(0.5, ge=0, le=2, description="power of the mean magnitude; 0 is plain SVD")


@method("asvd", source="arXiv 2312.05821", needs=["abs_mean"], settings=AsvdSettings)
def solve(weight: Tensor, stats: TargetStats, settings: AsvdSettings) -> Factored:
    """Truncated SVD of W S (out, in); energies are squared singular values, an error in the scaled metric."""
    assert stats.group.abs_mean is not None
    return scaled_svd(weight, stats.group.abs_mean.double() ** settings.alpha)
