"""Basis sharing: neighbouring layers keep one right factor for each of their reading roles (q, k, v, gate, up).

The weights of one role in `layers` neighbouring layers are stacked on their outputs and factored as one matrix in the metric of
the mean of the layers' grams: one basis, and a left factor per layer. The matrices that write back into the residual stream (o,
down) read inputs that have little in common between layers; they are factored alone, as by `svd-llm`.

When to use: on models whose keys and values are not grouped. With grouped-query attention the published results are worse than
those of `svd-llm` (Llama-3-8B), and from a kept share of 0.6 on downwards the layers' inputs differ too much.

Cost: one symmetric eigenproblem on (in, in) per role and run of layers, found anew only where a run was interrupted within the
layers. Statistics: a gram (in, in) per group, kept on disk; a set's weights are in memory together.

Source: Wang et al., Basis Sharing, arXiv 2410.03765, §3, with 2 layers; rank = ⌊kept · g · m · n / (m + g · n)⌋ for g targets
of n outputs and m inputs. Differences from the authors' code: the grams' mean instead of their sum (the same directions), no
Cholesky factor and no inverse, so that exactly singular grams need no damping; their optional second fit of the coefficients on
the compressed model's inputs is not done; layers whose targets were kept dense leave the others of their run to share.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..base import Joint, TargetStats, method
from ..neighbours import NeighbourSettings, neighbours
from . import svd_llm
from .stacked import StackMember, shared_options, solve_stack


def solve_set(
    weights: Sequence[Tensor], statistics: Sequence[TargetStats], parts: Sequence[str], settings: NeighbourSettings
) -> list[StackMember]:
    """Projection of the stack of the layers' weights (out, in) onto its leading output directions."""
    return solve_stack(weights, statistics)


@method(
    "basis-sharing", source="arXiv 2410.03765", needs=["output_gram"], settings=NeighbourSettings,
    joint=Joint(neighbours, shared_options, solve_set, across_layers=True, needs={"": frozenset({"gram"})}),
)  # fmt: skip
def solve(weight: Tensor, stats: TargetStats, settings: NeighbourSettings) -> svd_llm.Projected:
    """A target (out, in) that shares nothing."""
    return svd_llm.solve(weight, stats, settings)
