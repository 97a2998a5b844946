"""Energy: each target's smallest rank that keeps 99 % of its outputs' variance.

The map is that of `lord` (principal components of the centred outputs, with a bias); the rank is what each target itself asks
for, in steps that suit a processor, and a target that would save nothing at that rank stays dense.

When to use: with `allocation: own`, where quality is given and the size follows from it. Encoders of speech and vision have
outputs of low rank and shrink much; most targets of a language model do not and stay dense.

Cost: that of `lord`. Needs no ratio.

Source: Kamahori et al., LiteASR, arXiv 2502.20583: the smallest multiple of 16 with an energy of 0.99 (attention) or 0.999
(feed-forward). Difference: a target stays dense from the rank on at which factors are no smaller, where the authors' code has
fixed limits (half of the width in attention, 0.8 in the feed-forward part). One threshold is for all targets here.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field
from torch import Tensor

from ..base import TargetStats, method
from ..options import Choice, break_even
from . import lord


class EnergySettings(lord.LordSettings):
    """Settings of `energy`, beside those of `lord`."""

    keep: float = Field(
        0.99, gt=0, le=1, description="part of the outputs' energy (variance where `centre` is on) that the rank must hold"
    )
    multiple: int = Field(16, ge=1, le=1024, description="the rank is rounded up to a multiple of this")


@dataclass(frozen=True)
class Kept(lord.Affine):
    """The affine map that knows the rank for a part of the energy.

    Args:
        settings: what part, and in which steps.
    """

    settings: EnergySettings

    @property
    def preferred(self) -> Choice:
        held = rank_for_energy(self.energy, self.settings.keep)
        rank = -(-held // self.settings.multiple) * self.settings.multiple
        return Choice(rank=rank) if 0 < rank <= break_even(*self.weight.shape) else Choice()


def rank_for_energy(energy: Tensor, keep: float) -> int:
    """The smallest number of leading components that hold `keep` of the sum of `energy` (k,), descending; 0 of nothing."""
    total = energy.sum()
    if total <= 0:
        return 0
    # what all but the leading ones may leave out: sums of the small values, from the smallest on, are exact where those of
    # the large ones have lost the last digits
    left_out = energy.flip(0).cumsum(0).flip(0)
    return int((left_out > (1 - keep) * total).sum())


@method("energy", source="arXiv 2502.20583", needs=["output_gram", "mean"], settings=EnergySettings, options=lord.options)
def solve(weight: Tensor, stats: TargetStats, settings: EnergySettings) -> Kept:
    """Principal components of the outputs of a weight (out, in); energies are the eigenvalues of their covariance."""
    plain = lord.solve(weight, stats, settings)
    return Kept(plain.energy, plain.weight, plain.directions, plain.mean, settings)
