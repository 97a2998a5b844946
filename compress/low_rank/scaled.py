"""Truncated SVD of a weight whose input channels are scaled first: a diagonal in the place of the full gram."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import Factored, balanced


def scaled_svd(weight: Tensor, scale: Tensor) -> Factored:
    """The best rank-k maps in the metric of a diagonal: SVD of `W S`, S divided out of the right factor.

    Args:
        weight: (out, in), any floating dtype.
        scale: (in,), not negative. A channel at 0 counts as much as the least of the others, so that its column of the right
            factor stays finite; where all are 0, which is an expert that saw no token, this is the plain SVD.

    Returns:
        Factors in float64; energies are squared singular values, an error in the scaled metric.
    """
    wide = scale.double()
    positive = wide[wide > 0]
    wide = wide.clamp_min(positive.min() if len(positive) else 1.0)
    left, values, right = torch.linalg.svd(weight.double() * wide, full_matrices=False)
    return Factored(values**2, *balanced(left * values, right / wide))
