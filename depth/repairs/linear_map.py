"""Linear map: a run of dropped layers is replaced by the affine map that is nearest to it.

With x the hidden state before the run and y the state after it in the original model, y ≈ x + D x + b by least squares, fitted
after subtracting the means. D is the solution of least norm, so directions that do not occur in calibration are not changed.

When to use: for long runs and much calibration text: there are hidden² numbers to fit. No weight of a decoder can hold a map of
the hidden state, so the checkpoint needs lrc to load. Cost: hidden² + hidden numbers per run.

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

    With b, which is not damped, the covariance of x replaces E x xᵀ.
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
