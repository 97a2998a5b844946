"""Utilized rank: each target gets the rank of the subspaces that its inputs and its outputs occupy.

k_S directions hold a given fraction of the energy of the inputs, k_T directions that of the outputs. A map between these
subspaces needs at most r = min(k_S, k_T) components, whatever the rank of the weight. The target gets rank r, or stays dense
where factors of that rank would not be smaller.

When to use: with `allocation: own`, to see how much of its width each target uses, or to fix the quality and let the size
follow. Unlike `energy` it looks at the inputs too, and adds no bias.

Cost: that of `svd-llm`, plus the eigenvalues of the input's gram for each target. Statistics: a gram (in, in) per group. Needs
no ratio.

Source: Garg et al., Revealing the Utilized Rank of Subspaces of Learning in Neural Networks, arXiv 2407.04797, r = min(k_S,
k_T). Differences: the authors project the weight onto both subspaces, W' = P_T W P_S; lrc takes the map of that rank with the
least output error (svd_llm.py), which W' is not; the fraction of the energy is a setting here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from ..base import Settings, TargetStats, method
from ..options import Choice, break_even
from . import svd_llm
from .energy import rank_for_energy


class UtilizedRankSettings(Settings):
    """Settings of `utilized-rank`."""

    keep: float = Field(
        0.99, gt=0, le=1, description="fraction of the inputs' and of the outputs' energy that a subspace must hold"
    )
    multiple: int = Field(16, ge=1, le=1024, description="the rank is rounded up to a multiple of this")


@dataclass(frozen=True)
class Utilized(svd_llm.Projected):
    """The best map of each rank, with the rank that inputs and outputs can use.

    Args:
        inputs: number of directions that hold the wanted fraction of the inputs' energy.
        outputs: the same for the outputs.
        multiple: the rank is rounded up to a multiple of this.
    """

    inputs: int
    outputs: int
    multiple: int

    @property
    def preferred(self) -> Choice:
        rank = -(-min(self.inputs, self.outputs) // self.multiple) * self.multiple
        return Choice(rank=rank) if 0 < rank <= break_even(*self.weight.shape) else Choice()


@method("utilized-rank", source="arXiv 2407.04797", needs=["gram"], settings=UtilizedRankSettings)
def solve(weight: Tensor, stats: TargetStats, settings: UtilizedRankSettings) -> Utilized:
    """Projection of the weight (out, in) onto its leading output directions, and the dimensions of the two subspaces."""
    assert stats.group.gram is not None
    plain = svd_llm.solve(weight, stats, settings)
    seen = torch.linalg.eigvalsh(stats.group.gram.double()).flip(0).clamp_min(0)
    inputs, outputs = (rank_for_energy(energy, settings.keep) for energy in (seen, plain.energy))
    return Utilized(plain.energy, plain.weight, plain.directions, inputs, outputs, settings.multiple)
