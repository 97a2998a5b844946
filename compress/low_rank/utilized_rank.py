"""Utilized rank: each target's rank is bounded by the subspaces that its inputs and its outputs really occupy.

k_S directions hold a given part of the energy of the inputs, k_T of the outputs. A map between the two needs no more than
r = min(k_S, k_T) components, whatever the weight's own rank; the target gets that rank, or stays dense where factors of that
rank are no smaller.

When to use: with `allocation: own`, to see how much of its width each target uses, or where quality is given and the size
follows. It differs from `energy` by looking at the inputs too, and adds no bias.

Cost: that of `svd-llm`, and the eigenvalues of the input's gram for each target. Statistics: a gram (in, in) per group. Needs
no ratio.

Source: Garg et al., Revealing the Utilized Rank of Subspaces of Learning in Neural Networks, arXiv 2407.04797, r = min(k_S,
k_T). Differences: the authors project the weight onto both subspaces, W' = P_T W P_S; of all maps of that rank lrc takes the
one with the least output error (compress/low_rank/svd_llm.py), which W' is not; and how much energy the subspaces must hold is
a setting here.
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

    keep: float = Field(0.99, gt=0, le=1, description="part of the inputs' and of the outputs' energy that a subspace holds")
    multiple: int = Field(16, ge=1, le=1024, description="the rank is rounded up to a multiple of this")


@dataclass(frozen=True)
class Utilized(svd_llm.Projected):
    """The best map of each rank, which knows the rank that inputs and outputs have use for.

    Args:
        inputs: number of directions that hold the inputs' energy; outputs: the same of the outputs.
        multiple: steps of the rank.
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
    """Projection of the weight (out, in) onto its leading output directions, and the two subspaces' sizes."""
    assert stats.group.gram is not None
    plain = svd_llm.solve(weight, stats, settings)
    seen = torch.linalg.eigvalsh(stats.group.gram.double()).flip(0).clamp_min(0)
    inputs, outputs = (rank_for_energy(energy, settings.keep) for energy in (seen, plain.energy))
    return Utilized(plain.energy, plain.weight, plain.directions, inputs, outputs, settings.multiple)
