"""Which parts of a model may go, and when enough of them are gone."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..errors import BudgetError
from ..model.sublayers import SubLayer
from .base import Enough
from .spec import DepthSpec


def open_layers(layers: int, spec: DepthSpec) -> range:
    """The layers that may go, of so many."""
    return range(spec.protect_first, layers - spec.protect_last)


def open_sublayers(sublayers: Sequence[SubLayer], layers: int, spec: DepthSpec) -> list[int]:
    """The numbers of the sub-layers that may go.

    Raises:
        BudgetError: they are fewer, or smaller, than what is to go.
    """
    parts = [number for number, sublayer in enumerate(sublayers) if sublayer.layer in open_layers(layers, spec)]
    if not enough_sublayers(sublayers, spec)(parts):
        wanted = f"{spec.drop} sub-layers" if spec.drop is not None else f"{spec.ratio:.0%} of the targets"
        share = _numel([sublayers[number] for number in parts]) / _numel(sublayers)
        raise BudgetError(
            f"depth: {wanted} shall go; {len(parts)} of {len(sublayers)} sub-layers ({share:.0%}) are not protected.",
            "Change depth.drop (or depth.ratio), depth.protect_first or depth.protect_last.",
        )
    return parts


def enough_sublayers(sublayers: Sequence[SubLayer], spec: DepthSpec) -> Enough:
    """Whether sub-layers are as many as `drop` says, or hold as much of all targets as `ratio` says."""
    if spec.drop is not None:
        wanted = spec.drop
        return lambda gone: len(gone) >= wanted
    least = (spec.ratio or 0.0) * _numel(sublayers)
    return lambda gone: _numel([sublayers[number] for number in gone]) >= least


def _numel(sublayers: Collection[SubLayer]) -> int:
    return sum(target.numel for sublayer in sublayers for target in sublayer.targets)
