"""Shared input: one right factor for all targets that read the same input (q, k, v; gate, up).

Their weights are stacked and factored as one matrix, in the metric of the input's gram. At the same bytes the stack gets a
higher rank than each of its matrices would get alone: three square matrices of width n at 0.8 of their bytes get rank 0.6 n
together and 0.4 n alone. The price is that all three read the input through the same subspace.

When to use: instead of `svd-llm`, at the same bytes, where queries, keys and values (or gate and up) use much the same
directions of their input. Each matrix multiplies by the shared factor for itself, so the model computes more than with
`svd-llm` at the same bytes.

Cost: one symmetric eigenproblem per unit, of size min(in, Σ out). Statistics: a gram (in, in) per group that shares a factor;
the cheaper side for the other targets.

Source: the projection of SVD-LLM (arXiv 2403.07378 §3.2), applied to the stack; LatentLLM (arXiv 2505.18413) compresses the
input side of attention jointly in a similar way. Targets that are the only ones to read their input (o, down, experts) are
solved as by `svd-llm`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..base import Joinable, Joint, JointUnit, Settings, TargetStats, method
from . import svd_llm
from .stacked import StackMember, shared_options, solve_stack


def units(targets: Sequence[Joinable], settings: Settings) -> list[JointUnit]:
    """The groups of two or more targets that read one input; experts are left out."""
    readers: dict[str, list[str]] = {}
    for target in targets:
        if target.expert is None:
            readers.setdefault(target.group, []).append(target.name)
    return [JointUnit(tuple(names), ("",) * len(names)) for names in readers.values() if len(names) > 1]


def solve_together(
    weights: Sequence[Tensor], statistics: Sequence[TargetStats], slots: Sequence[str], settings: Settings
) -> list[StackMember]:
    """Projection of the stacked weights (out, in) onto the leading output directions of the stack."""
    return solve_stack(weights, statistics)


@method(
    "shared-input", source="arXiv 2403.07378; arXiv 2505.18413", needs=["output_gram"],
    joint=Joint(units, shared_options, solve_together, needs={"": frozenset({"gram"})}),
)  # fmt: skip
def solve(weight: Tensor, stats: TargetStats, settings: Settings) -> svd_llm.Projected:
    """A target (out, in) that shares nothing: as `svd-llm`."""
    return svd_llm.solve(weight, stats, settings)
