"""ReplaceMe: what the last feed-forward before the cut adds is mapped, by least squares, to make up for the dropped layers.

With M what that sub-layer adds to the stream, Y the rest of the stream, and y the state after the dropped layers, T is the
least-squares solution of M T ≈ y - Y. Where M is the output of a matrix (pre-norm models), T goes into that matrix and its
bias, and the checkpoint stays plain; where a norm or a mixture of experts comes after it, T is a linear layer of its own
behind the sub-layer, and the checkpoint needs lrc. Where no layer comes before the cut, T maps the hidden state itself.

When to use: the first repair to try: it costs no byte on most models, and no training. Cost: one solve of width hidden.

Source: Shopkhoev et al., ReplaceMe, arXiv 2505.02819 (eq. 5 to 7, α is `damping`, towards the identity). Differs from the
authors: the bias is mapped too; directions that calibration does not show stay as they are; Y and M are the pruned model's.
"""

from __future__ import annotations

from ..base import repair
from .linear_map import LeastSquares


@repair("replace-me", source="arXiv 2505.02819", on="sub-layer", damped=True)
def fit(width: int, damping: float) -> LeastSquares:
    """Least squares without a bias."""
    return LeastSquares(width, damping, bias=False)
