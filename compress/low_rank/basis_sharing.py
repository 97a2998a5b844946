"""Basis sharing: neighbouring layers share one right factor for each of q, k, v, gate and up.

The weights of one role (q_proj, say) in `layers` neighbouring layers are stacked along their outputs and factored as one
matrix, in the metric of the mean of the layers' grams. The result is one shared basis and one left factor per layer. The output
and down projections are factored alone, as by `svd-llm`, because their inputs have little in common between layers.

When to use: on models without grouped-query attention; on one that has it (Llama-3-8B) the published results are worse than
those of `svd-llm`. Where 0.6 of the bytes or less are kept, the inputs of neighbouring layers differ too much to share a basis.

Cost: one symmetric eigenproblem of size (in, in) per role and run of layers; it is repeated only if the run was interrupted
inside these layers. Statistics: a gram (in, in) per group, kept on disk. The weights of one unit are in memory together.

Source: Wang et al., Basis Sharing, arXiv 2410.03765, §3, with 2 layers; rank = ⌊kept · g · m · n / (m + g · n)⌋ for g targets
of n outputs and m inputs. Differences from the authors' code: the mean of the grams instead of their sum (the same directions);
no Cholesky factor and no inverse, so that exactly singular grams need no damping; no second fit of the coefficients to the
compressed model's inputs, which is an option there; where a target of the run is kept dense, the others still share.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..base import Joint, TargetStats, method
from ..neighbours import NeighbourSettings, neighbours
from . import svd_llm
from .stacked import StackMember, shared_options, solve_stack


def solve_together(
    weights: Sequence[Tensor], statistics: Sequence[TargetStats], slots: Sequence[str], settings: NeighbourSettings
) -> list[StackMember]:
    """Projection of the stacked weights (out, in) of the layers onto the leading output directions of the stack."""
    return solve_stack(weights, statistics)


@method(
    "basis-sharing", source="arXiv 2410.03765", needs=["output_gram"], settings=NeighbourSettings,
    joint=Joint(neighbours, shared_options, solve_together, across_layers=True, needs={"": frozenset({"gram"})}),
)  # fmt: skip
def solve(weight: Tensor, stats: TargetStats, settings: NeighbourSettings) -> svd_llm.Projected:
    """A target (out, in) that shares nothing: as `svd-llm`."""
    return svd_llm.solve(weight, stats, settings)
