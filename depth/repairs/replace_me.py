"""ReplaceMe: a linear map of the last feed-forward's output before the cut, by least squares, replaces the dropped layers.

With M the output of that sub-layer, Y the rest of the hidden state, and y the state after the dropped layers in the original
model, T is the least-squares solution of M T ≈ y - Y. Where M is the output of a matrix (pre-norm models), T is multiplied into
that matrix and its bias, and the checkpoint stays plain. Where a norm or a mixture of experts computes M, T is a linear layer
after the sub-layer, and the checkpoint needs lrc. Where no layer is before the cut, T maps the hidden state itself.

When to use: as the first repair to try: on most models it adds no bytes, and it needs no training. Cost: one solve of width
hidden.

Source: Shopkhoev et al., ReplaceMe, arXiv 2505.02819 (eq. 5 to 7, α is `damping`, towards the identity). Differs from the
authors: the bias is mapped too; directions that do not occur in calibration are not changed; Y and M are the pruned model's.
"""

from __future__ import annotations

from ..base import repair
from .linear_map import LeastSquares


@repair("replace-me", source="arXiv 2505.02819", on="sub-layer", damped=True)
def fit(width: int, damping: float) -> LeastSquares:
    """Least squares without a bias."""
    return LeastSquares(width, damping, bias=False)
