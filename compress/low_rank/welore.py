"""WeLore: plain SVD with one threshold for the singular values of all targets.

The singular values of each target are normalised to [0, 1] by its own smallest and largest one; those below the threshold are
dropped. Targets with a heavy-tailed spectrum become low rank in this way. Targets with a flat spectrum keep a rank at which
factors are not smaller, and stay dense.

When to use: with `allocation: own`, where there is no calibration text. Like `svd` it uses no data. The authors fine-tune the
targets that became low rank afterwards (the second half of the paper).

Cost: one SVD per target. Needs no statistics and no ratio: the threshold determines the size.

Source: Jaiswal et al., From GaLore to WeLore, arXiv 2407.11239; thresholds for Llama-2-7B from the authors' code: 0.0225,
0.084, 0.115, 0.145, 0.175, 0.215 and 0.26 for a mean rank reduced by 10 to 70 % (of ranks, not of parameters: a square matrix
saves nothing before 50 %). Difference: the authors' code lists targets and thresholds for each model; here the targets follow
from the spectrum.
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

    threshold: float = Field(0.145, ge=0, le=1, description="normalised singular values below it are dropped; 0 keeps all")


@dataclass(frozen=True)
class Thresholded(Factored):
    """Truncated SVD, with the rank that a threshold gives.

    Args:
        threshold: for the normalised singular values.
    """

    threshold: float

    @property
    def spectrum(self) -> Tensor:
        """(k,) float64, descending: the singular values, scaled so that the smallest is 0 and the largest 1; all 1 if equal."""
        values = self.energy.sqrt()
        span = values[0] - values[-1]
        return (values - values[-1]) / span if span > 0 else torch.ones_like(values)

    def rank_for_threshold(self, threshold: float) -> int:
        """The number of normalised singular values that are not below the threshold."""
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
