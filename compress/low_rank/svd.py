"""Plain singular value decomposition: the best rank-k matrix, without calibration data.

When to use: to learn how the methods work, and as a baseline. On language models it fails at any useful ratio, because it
treats the few input channels that carry most of the activations' energy like all others (LLaMA-7B at 20 %: perplexity 20061,
D-Rank arXiv 2509.25622).

Cost: one SVD per target. Needs no statistics.

Source: Eckart and Young, Psychometrika 1 (1936): the truncated SVD minimises ‖W - W'‖ among all matrices of its rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import Factored, Settings, TargetStats, balanced, method


@method("svd", source="Eckart & Young 1936")
def solve(weight: Tensor, stats: TargetStats, settings: Settings) -> Factored:
    """Truncated SVD of the weight (out, in); energies are squared singular values."""
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    left, right = balanced(left * values, right)
    return Factored(values**2, left, right)


def scaled_svd(weight: Tensor, scale: Tensor) -> Factored:
    """The best rank-k maps in a diagonal metric: the SVD of `W S`, with S divided out of the right factor afterwards.

    `asvd`, `fwsvd` and `lorap` are this decomposition, each with its own scale.

    Args:
        weight: (out, in), any floating dtype.
        scale: (in,), not negative. A channel with scale 0 gets the smallest positive scale, so that its column of the right
            factor stays finite. Where all are 0 (an expert that saw no token), the result is the plain SVD.

    Returns:
        Factors in float64; energies are squared singular values, errors in the scaled metric.
    """
    wide = scale.double()
    positive = wide[wide > 0]
    wide = wide.clamp_min(positive.min() if len(positive) else 1.0)
    left, values, right = torch.linalg.svd(weight.double() * wide, full_matrices=False)
    return Factored(values**2, *balanced(left * values, right / wide))
