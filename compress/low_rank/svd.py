"""Plain singular value decomposition: the best rank-k matrix, blind to the data.

When to use: as the teaching example and the baseline. On language models it fails at any useful ratio, because the few input
channels that carry most of the activations' energy count no more than the others (LLaMA-7B at 20 %: perplexity 20061,
D-Rank arXiv 2509.25622).

Cost: one SVD per target. Needs no statistics.

Source: Eckart and Young, Psychometrika 1 (1936): the truncated SVD minimises ‖W - W'‖ among all matrices of its rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import Factored, Settings, TargetStats, balanced, method


@method("svd", source="Eckart & Young 1936")
def solve(weight: Tensor, stats: TargetStats, settings: Settings) -> Factored:
    """Truncated SVD of the weight (out, in); energies are squared singular values."""
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    left, right = balanced(left * values, right)
    return Factored(values**2, left, right)
