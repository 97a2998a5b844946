"""Two-sided metric: output errors weighed by how much the loss feels them.

Minimises `tr(ΔWᵀ G ΔW C)`, the Kronecker-factored curvature of the loss: C is the gram of the inputs, G the mean over tokens
of the outer product of the output gradients. With `G = L Lᵀ` this is `‖Lᵀ ΔW C^½‖²`, so the optimum is the projection of
`Lᵀ W` onto the leading eigenvectors U of `Lᵀ W C Wᵀ L`: `left = L⁻ᵀ U`, `right = Uᵀ Lᵀ W`. Half of the energy left out is the
predicted rise of the loss in nats per token, on one scale for all targets.

When to use: where a backward pass can be paid for; with `allocation: fisher` its losses need no further scaling.

Cost: two eigenproblems per target beside the backward pass. G is shrunk towards its mean diagonal (`shrink_grad`): the Fisher
of few tokens has low rank, and directions that it does not see would be thrown away at no price.

Source: KFAC-SVD in LEMS (ICML 2026, OpenReview IjIgNPFuCt). Difference from the authors' code: it takes L for Lᵀ on the left,
which is another metric; here the identity above is tested. No inverse of C: its root is used, singular or not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from ..base import LowRankSolution, Settings, TargetStats, balanced, method
from ..forms.base import LowRank
from ..linalg import Eigen, OutputDirections, eigh
from ..options import Choice


class KfacSettings(Settings):
    """Settings of `kfac`."""

    shrink_gram: float = Field(0.0, ge=0, le=1, description="part of the input gram that is replaced by its mean diagonal")
    shrink_grad: float = Field(
        0.3, gt=0, le=1, description="the same for the gradients' gram; above 0, so that every output direction has a price"
    )


@dataclass(frozen=True)
class TwoSided(LowRankSolution):
    """Projection in the metric of both sides."""

    weight: Tensor
    gradients: Eigen  # of the shrunk gram of the output gradients
    directions: OutputDirections  # of the whitened outputs

    def form(self, choice: Choice) -> LowRank:
        basis = self.directions.basis(self.rank(choice))
        scale, vectors = self.gradients.values.sqrt(), self.gradients.vectors
        # the symmetric root serves as L: L = Lᵀ, and its inverse exists since shrinking made every eigenvalue positive
        left = vectors @ ((vectors.T @ basis) / scale[:, None])
        right = ((basis.T @ vectors) * scale) @ (vectors.T @ self.weight.double())
        return LowRank(*balanced(left, right))


@method("kfac", source="OpenReview IjIgNPFuCt", needs=["gram", "grad_gram"], settings=KfacSettings)
def solve(weight: Tensor, stats: TargetStats, settings: KfacSettings) -> TwoSided:
    """Two-sided projection of a weight (out, in); energies are in nats per token."""
    if stats.group.gram is None or stats.grad_gram is None:
        raise ValueError("kfac needs the gram of the inputs and that of the output gradients")
    gram = shrunk(stats.group.gram, settings.shrink_gram)
    gradients = output_metric(stats.grad_gram, settings.shrink_grad)
    half = gradients.root()
    directions = OutputDirections(half @ weight.double(), gram)
    return TwoSided(directions.values / 2, weight, gradients, directions)


def output_metric(grad_gram: Tensor, shrink: float) -> Eigen:
    """G (out, out), shrunk, as its eigenpairs; none of them is zero."""
    found = eigh(shrunk(grad_gram, shrink), "gram of the output gradients")
    tiny = torch.finfo(torch.float64).tiny
    return Eigen(found.values.clamp_min(max(tiny, float(found.values[0]) * 1e-12)), found.vectors)


def shrunk(gram: Tensor, part: float) -> Tensor:
    """`(1 - part) · gram + part · mean diagonal · I`, float64."""
    wide = gram.double()
    return (1 - part) * wide + part * wide.diagonal().mean() * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
