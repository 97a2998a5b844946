"""SVD-LLM: the best rank-k map for the calibration activations.

Minimises E‖W x - W' x‖² over all W' of rank k: this is the truncated SVD in the metric of the input gram. The optimum is
`W' = U_k U_kᵀ W` with U_k the leading eigenvectors of E[y yᵀ], y = W x; its error is the sum of the eigenvalues left out.

When to use: the default among one-shot methods. With `propagate: compressed` the gram is that of the inputs which the already
compressed earlier layers produce.

Cost: one symmetric eigenproblem per target on its smaller side (plus one per group where the output side is the larger).
Statistics: a gram (in, in) per group or (out, out) per target, whichever is cheaper.

Source: Wang et al., SVD-LLM, arXiv 2403.07378, §3.2 and theorem 3.2. Differences from the authors' code: no Cholesky factor and
no inverse, so an exactly singular gram needs no damping (linalg.py shows that the map is the same); each target's rank
follows from its own shape, also for grouped-query k and v; the grams are means over tokens, not sums.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..base import LowRankSolution, Settings, TargetStats, balanced, method
from ..forms.base import LowRank
from ..linalg import OutputDirections, project
from ..options import Choice


@dataclass(frozen=True)
class Projected(LowRankSolution):
    """Projection onto leading output directions; the factors are computed for the rank that is asked for."""

    weight: Tensor  # (out, in)
    directions: OutputDirections

    def form(self, choice: Choice) -> LowRank:
        basis = self.directions.basis(self.rank(choice))
        return LowRank(*balanced(basis, project(basis, self.weight)))


@method("svd-llm", source="arXiv 2403.07378", needs=["output_gram"])
def solve(weight: Tensor, stats: TargetStats, settings: Settings) -> Projected:
    """Projection of the weight (out, in) onto its leading output directions; energies are the eigenvalues of E[y yᵀ]."""
    directions = stats.directions(weight)
    return Projected(directions.values, weight, directions)
