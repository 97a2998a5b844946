"""Energy: for each target the smallest rank that keeps 99 % of the variance of its outputs.

The map is that of `lord` (principal components of the centred outputs, with a bias). The rank follows from the target's own
spectrum, rounded up to a multiple that suits the hardware. A target whose factors would not be smaller at that rank stays
dense.

When to use: with `allocation: own`, to fix the quality and let the size follow. Encoders of speech and vision have outputs of
low rank and become much smaller; most targets of a language model do not, and stay dense.

Cost: that of `lord`. Needs no ratio.

Source: Kamahori et al., LiteASR, arXiv 2502.20583: the smallest multiple of 16 with an energy of 0.99 (attention) or 0.999
(feed-forward). Differences: a target stays dense where its factors would not be smaller, while the authors' code has fixed
limits (half of the width in attention, 0.8 in the feed-forward); one threshold applies to all targets here.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field
from torch import Tensor

from ..base import TargetStats, method
from ..options import Choice, break_even
from . import lord


class EnergySettings(lord.LordSettings):
    """Settings of `energy`: those of `lord`, and the threshold."""

    keep: float = Field(
        0.99,
        gt=0,
        le=1,
        description="fraction of the outputs' energy (their variance if `centre` is on) that the rank must keep",
    )
    multiple: int = Field(16, ge=1, le=1024, description="the rank is rounded up to a multiple of this")


@dataclass(frozen=True)
class Kept(lord.Affine):
    """The affine map of `lord`, with the rank that keeps a fraction of the energy.

    Args:
        settings: which fraction, and the multiple that the rank is rounded up to.
    """

    settings: EnergySettings

    @property
    def preferred(self) -> Choice:
        held = rank_for_energy(self.energy, self.settings.keep)
        rank = -(-held // self.settings.multiple) * self.settings.multiple
        return Choice(rank=rank) if 0 < rank <= break_even(*self.weight.shape) else Choice()


def rank_for_energy(energy: Tensor, keep: float) -> int:
    """The smallest number of leading components with a fraction `keep` of the total energy; 0 if the total is 0.

    Args:
        energy: (k,) descending.
    """
    total = energy.sum()
    if total <= 0:
        return 0
    # compare the energy left out: summed from the smallest value on it is exact, while a sum that starts with the largest
    # values has lost its last digits by then
    left_out = energy.flip(0).cumsum(0).flip(0)
    return int((left_out > (1 - keep) * total).sum())


@method("energy", source="arXiv 2502.20583", needs=["output_gram", "mean"], settings=EnergySettings, options=lord.options)
def solve(weight: Tensor, stats: TargetStats, settings: EnergySettings) -> Kept:
    """Principal components of the outputs of a weight (out, in); energies are the eigenvalues of the outputs' covariance."""
    plain = lord.solve(weight, stats, settings)
    return Kept(plain.energy, plain.weight, plain.directions, plain.mean, settings)
