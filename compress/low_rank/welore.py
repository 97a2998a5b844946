"""WeLore: plain SVD with one threshold for the singular values of all targets.

Singular values of a target are normalised to [0, 1] by its own smallest and largest; what lies below the threshold goes. Heavy-
tailed targets become low rank that way, and those with a flat spectrum keep a rank at which factors save nothing: they stay
dense.

When to use: with `allocation: own`, and with data too short or too secret to calibrate on. Blind to the data like `svd`, and
made to be followed by fine-tuning of the targets that became low rank (the paper's second half).

Cost: one SVD per target. Needs no statistics and no ratio: the threshold says how much goes.

Source: Jaiswal et al., From GaLore to WeLore, arXiv 2407.11239; thresholds for Llama-2-7B from the authors' code: 0.0225,
0.084, 0.115, 0.145, 0.175, 0.215 and 0.26 for a mean rank reduced by 10 to 70 % (of ranks, not of parameters: a square matrix
saves nothing before 50 %). Difference: the authors' code lists its targets and thresholds by model, here they follow from the
spectrum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from ..base import Factored, Settings, TargetStats, method
from ..options import Choice, break_even
from . import svd


class WeloreSettings(Settings):
    """Settings of `welore`."""

    threshold: float = Field(0.145, ge=0, le=1, description="normalised singular values below it go; 0 keeps all")


@dataclass(frozen=True)
class Thresholded(Factored):
    """Truncated SVD that knows the rank for a threshold.

    Args:
        threshold: of normalised singular values.
    """

    threshold: float

    @property
    def spectrum(self) -> Tensor:
        """(k,) float64, descending: singular values from 0 (the smallest) to 1 (the largest); all 1 where they are equal."""
        values = self.energy.sqrt()
        span = values[0] - values[-1]
        return (values - values[-1]) / span if span > 0 else torch.ones_like(values)

    def rank_for_threshold(self, threshold: float) -> int:
        """How many normalised singular values reach the threshold."""
        return int((self.spectrum >= threshold).sum())

    @property
    def preferred(self) -> Choice:
        rank = self.rank_for_threshold(self.threshold)
        return Choice(rank=rank) if rank <= break_even(self.left.shape[0], self.right.shape[1]) else Choice()


@method("welore", source="arXiv 2407.11239", settings=WeloreSettings)
def solve(weight: Tensor, stats: TargetStats, settings: WeloreSettings) -> Thresholded:
    """Truncated SVD of the weight (out, in); energies are squared singular values."""
    plain = svd.solve(weight, stats, settings)
    return Thresholded(plain.energy, plain.left, plain.right, settings.threshold)
