"""The metric in which a weight's error is measured: tr(E C Eᵀ) with C the gram, its diagonal, or the identity."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import TargetStats


@dataclass(frozen=True)
class Metric:
    """`energy(E) = tr(E C Eᵀ)`.

    Args:
        matrix: C as (in, in), or as its diagonal (in,); None is the identity.
    """

    matrix: Tensor | None = None

    @classmethod
    def of(cls, stats: TargetStats) -> Metric:
        """The metric of the input gram, or the identity where no gram was collected."""
        return cls(stats.group.gram)

    def times(self, rows: Tensor) -> Tensor:
        """`rows C` in float64 for rows (m, in)."""
        if self.matrix is None:
            return rows.double()
        matrix = self.matrix.to(rows.device, torch.float64)
        return rows.double() @ matrix if matrix.ndim == 2 else rows.double() * matrix

    def energy(self, error: Tensor) -> float:
        """tr(E C Eᵀ) of an error (out, in): with a gram, the mean squared output error per token."""
        return max(0.0, float((self.times(error) * error.double()).sum()))
