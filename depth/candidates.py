"""Which layers or sub-layers of a model may be removed, and when enough of them are."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..errors import BudgetError
from ..model.sublayers import SubLayer
from .base import Enough
from .spec import DepthSpec


def open_layers(layers: int, spec: DepthSpec) -> range:
    """The numbers of the layers that are not protected, in a model of so many layers."""
    return range(spec.protect_first, layers - spec.protect_last)


def open_sublayers(sublayers: Sequence[SubLayer], layers: int, spec: DepthSpec) -> list[int]:
    """The numbers of the sub-layers that are not protected.

    Raises:
        BudgetError: they are fewer, or smaller, than what `spec` removes.
    """
    candidates = [number for number, sublayer in enumerate(sublayers) if sublayer.layer in open_layers(layers, spec)]
    if not enough_sublayers(sublayers, spec)(candidates):
        wanted = f"{spec.drop} sub-layers" if spec.drop is not None else f"{spec.ratio:.0%} of the targets"
        share = _numel([sublayers[number] for number in candidates]) / _numel(sublayers)
        raise BudgetError(
            f"depth: {wanted} are to be removed; {len(candidates)} of {len(sublayers)} sub-layers ({share:.0%}) "
            "are not protected.",
            "Change depth.drop (or depth.ratio), depth.protect_first or depth.protect_last.",
        )
    return candidates


def enough_sublayers(sublayers: Sequence[SubLayer], spec: DepthSpec) -> Enough:
    """Tells of removed sub-layers whether they are `drop` or more, or hold `ratio` or more of all targets' weights."""
    if spec.drop is not None:
        wanted = spec.drop
        return lambda gone: len(gone) >= wanted
    least = (spec.ratio or 0.0) * _numel(sublayers)
    return lambda gone: _numel([sublayers[number] for number in gone]) >= least


def _numel(sublayers: Collection[SubLayer]) -> int:
    return sum(target.numel for sublayer in sublayers for target in sublayer.targets)
