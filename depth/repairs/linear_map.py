"""Linear map: the affine map that comes nearest to a whole run of dropped layers stands in for it.

With x the state that reaches the cut and y the state that the dropped layers made of it, y ≈ x + D x + b by least squares, with
the means taken out first. Directions that calibration does not show keep x as it is (D is the solution of least norm).

When to use: for long runs and much calibration text: there are hidden² numbers to fit. It is a map of the hidden state, which
no weight of a decoder holds, so the checkpoint needs lrc to load. Cost: hidden² + hidden numbers per run.

Source: the linear approximation of a layer of Razzhigaev et al., Your Transformer is Secretly Linear, arXiv 2405.12250, over a
run, with its bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...compress.chain import refit
from ..base import repair


class LeastSquares:
    """argmin over D (and b) of E‖x + D x + b - y‖² + damping · mean diagonal of E x xᵀ · ‖D‖², from running sums in float64.

    With b, which is not damped, the gram of the centred x takes the place of E x xᵀ.
    """

    def __init__(self, width: int, damping: float, bias: bool) -> None:
        self._damping, self._bias, self._tokens = damping, bias, 0
        self._gram, self._cross = (torch.zeros(width, width, dtype=torch.float64) for _ in range(2))
        self._inputs, self._residuals = (torch.zeros(width, dtype=torch.float64) for _ in range(2))

    def add(self, x: Tensor, y: Tensor) -> None:
        x = x.double()
        residual = y.double() - x
        self._tokens += len(x)
        self._gram += (x.T @ x).cpu()
        self._cross += (residual.T @ x).cpu()
        self._inputs += x.sum(0).cpu()
        self._residuals += residual.sum(0).cpu()

    def change(self) -> tuple[Tensor, Tensor | None]:
        gram, cross = self._gram / self._tokens, self._cross / self._tokens
        x, residual = self._inputs / self._tokens, self._residuals / self._tokens
        if self._bias:
            gram, cross = gram - torch.outer(x, x), cross - torch.outer(residual, x)
        gram = gram + self._damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        matrix = refit(cross, gram)
        return matrix, residual - matrix @ x if self._bias else None


@repair("linear-map", source="arXiv 2405.12250", on="stream", damped=True)
def fit(width: int, damping: float) -> LeastSquares:
    """Least squares with a bias."""
    return LeastSquares(width, damping, bias=True)
