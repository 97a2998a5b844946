"""Shared input: one right factor for all targets that read one input (q, k, v; gate, up).

Their weights are stacked and factored as one matrix in the metric of the input's gram. At the same bytes the stack gets a
higher rank than its members would alone: for three square matrices of width n kept at 0.8, 0.6 n where each alone has 0.4 n.
The price is that all three see the input through the same rank.

When to use: in the place of `svd-llm`, at the same bytes, where queries, keys and values (or gate and up) read much the same
directions of their input. One matrix multiplication with the shared factor serves no member but its own here: each computes it
for itself, so the number of operations is larger than that of `svd-llm` at the same bytes.

Cost: one symmetric eigenproblem per set on the smaller of (in, Σ out). Statistics: a gram (in, in) per group that shares, the
cheaper side for the others.

Source: the projection of SVD-LLM (arXiv 2403.07378 §3.2), applied to the stack; LatentLLM (arXiv 2505.18413) compresses the
input side of attention jointly in a like manner. Targets that read an input alone (o, down, experts) are solved as by
`svd-llm`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..base import Joinable, Joint, Settings, TargetSet, TargetStats, method
from . import svd_llm
from .stacked import StackMember, shared_options, solve_stack


def sets(targets: Sequence[Joinable], settings: Settings) -> list[TargetSet]:
    """The targets of each layer that read one input, where they are several."""
    readers: dict[str, list[str]] = {}
    for target in targets:
        if target.expert is None:
            readers.setdefault(target.group, []).append(target.name)
    return [TargetSet(tuple(names), ("",) * len(names)) for names in readers.values() if len(names) > 1]


def solve_set(
    weights: Sequence[Tensor], statistics: Sequence[TargetStats], parts: Sequence[str], settings: Settings
) -> list[StackMember]:
    """Projection of the stack of the weights (out, in) onto its leading output directions."""
    return solve_stack(weights, statistics)


@method(
    "shared-input", source="arXiv 2403.07378; arXiv 2505.18413", needs=["output_gram"],
    joint=Joint(sets, shared_options, solve_set, needs={"": frozenset({"gram"})}),
)  # fmt: skip
def solve(weight: Tensor, stats: TargetStats, settings: Settings) -> svd_llm.Projected:
    """A target (out, in) that reads its input alone."""
    return svd_llm.solve(weight, stats, settings)
