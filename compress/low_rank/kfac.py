"""Two-sided metric: output errors are weighted by their effect on the loss.

Minimises `tr(ΔWᵀ G ΔW C)`, the Kronecker-factored approximation of the loss's curvature: C is the gram of the inputs, G the
mean over tokens of the outer product of the output gradients. With `G = L Lᵀ` this is `‖Lᵀ ΔW C^½‖²`, so the optimum is the
projection of `Lᵀ W` onto the leading eigenvectors U of `Lᵀ W C Wᵀ L`: `left = L⁻ᵀ U`, `right = Uᵀ Lᵀ W`. Half of the energy
left out is the predicted increase of the loss in nats per token, on one scale for all targets.

When to use: where a backward pass is affordable. With `allocation: fisher` its losses need no further scaling.

Cost: two eigenproblems per target, plus the backward pass. G is shrunk towards its mean diagonal (`shrink_grad`): the Fisher
matrix of few tokens has low rank, and without shrinking the directions outside it could be dropped at no cost.

Source: KFAC-SVD in LEMS (ICML 2026, OpenReview IjIgNPFuCt). Differences from the authors' code: it uses L instead of Lᵀ on the
left, which is another metric; here a test checks the identity above. C is not inverted: its root is used, singular or not.
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

_LEAST = 1e-60  # an eigenvalue next to nothing whose root, inverse root and squares are float64 numbers


class KfacSettings(Settings):
    """Settings of `kfac`."""

    shrink_gram: float = Field(0.0, ge=0, le=1, description="fraction of the input gram that is replaced by its mean diagonal")
    shrink_grad: float = Field(
        0.3,
        gt=0,
        le=1,
        description="the same for the gradients' gram; above 0, so that an error in any output direction has a cost",
    )


@dataclass(frozen=True)
class TwoSided(LowRankSolution):
    """Projection in the two-sided metric."""

    weight: Tensor  # (out, in)
    gradients: Eigen  # of the shrunk gram of the output gradients
    directions: OutputDirections  # of the outputs, whitened by that gram

    def form(self, choice: Choice) -> LowRank:
        basis = self.directions.basis(self.rank(choice))
        scale, vectors = self.gradients.values.sqrt(), self.gradients.vectors
        if float(self.gradients.values[0]) <= _LEAST:  # no gradient was seen: a multiple of the metric has the same projection
            scale = torch.ones_like(scale)
        # L is the symmetric root, so L = Lᵀ; it has an inverse because shrinking made every eigenvalue positive
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
    """Eigenpairs of the shrunk G (out, out); every eigenvalue is positive, where no gradient was seen `_LEAST`."""
    found = eigh(shrunk(grad_gram, shrink), "gram of the output gradients")
    return Eigen(found.values.clamp_min(max(_LEAST, float(found.values[0]) * 1e-12)), found.vectors)


def shrunk(gram: Tensor, part: float) -> Tensor:
    """`(1 - part) · gram + part · mean diagonal · I`, float64."""
    wide = gram.double()
    return (1 - part) * wide + part * wide.diagonal().mean() * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
