"""Which parts of a model may go, and when enough of them are gone."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..errors import BudgetError
from ..model.sublayers import Branch
from .base import Enough
from .spec import DepthSpec


def open_layers(layers: int, spec: DepthSpec) -> range:
    """The layers that may go, of so many."""
    return range(spec.protect_first, layers - spec.protect_last)


def open_branches(branches: Sequence[Branch], layers: int, spec: DepthSpec) -> list[int]:
    """The numbers of the branches that may go.

    Raises:
        BudgetError: they are fewer, or smaller, than what is to go.
    """
    parts = [number for number, branch in enumerate(branches) if branch.layer in open_layers(layers, spec)]
    if not enough_branches(branches, spec)(parts):
        wanted = f"{spec.drop} halves of layers" if spec.drop is not None else f"{spec.ratio:.0%} of the targets"
        share = _numel([branches[number] for number in parts]) / _numel(branches)
        raise BudgetError(
            f"depth: {wanted} shall go; {len(parts)} of {len(branches)} halves ({share:.0%}) are not protected.",
            "Change depth.drop (or depth.ratio), depth.protect_first or depth.protect_last.",
        )
    return parts


def enough_branches(branches: Sequence[Branch], spec: DepthSpec) -> Enough:
    """Whether branches are as many as `drop` says, or hold as much of all targets as `ratio` says."""
    if spec.drop is not None:
        wanted = spec.drop
        return lambda gone: len(gone) >= wanted
    least = (spec.ratio or 0.0) * _numel(branches)
    return lambda gone: _numel([branches[number] for number in gone]) >= least


def _numel(branches: Collection[Branch]) -> int:
    return sum(target.numel for branch in branches for target in branch.targets)
