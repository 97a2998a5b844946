"""Which layers or sub-layers of a model may be removed, and when enough of them are.

Layers that stay get new numbers, and a configuration must describe the result (depth/renumbering/). In most models one
describes every choice; then a score chooses freely, and its choice is compared with the original before anything is compressed.
In others the layers that stay must keep a period, or only the last ones can go. Then every step of the choice keeps to layers
that can be completed to a set that can go; the plan says so, and refuses where there is no such set. Without sub-layers every
layer keeps its number.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import cached_property

from ..checkpoint.streamed import Checkpoint
from ..errors import BudgetError
from ..model.sublayers import SubLayer
from .base import Enough, get_repair, get_score
from .renumbering.shallower import Shallower
from .spec import DepthSpec, how_many


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


class Removable:
    """The sets of layers that a recipe can remove from a model.

    Args:
        view: the checkpoint, before any of its modules is replaced.
        spec: the recipe's `depth`.

    Attributes:
        open: the layers that are not protected.
        count: how many layers the score chooses: one more than are dropped where the repair keeps the first of them in place of
            the others.
    """

    def __init__(self, view: Checkpoint, spec: DepthSpec) -> None:
        self._known = Shallower.of(view)
        self._replaced = 1 if spec.repair != "none" and get_repair(spec.repair).on == "layer" else 0
        self._runs_only = get_score(spec.score).one_run
        self.open = open_layers(len(view.layers), spec)
        self.count = how_many(spec, len(view.layers)) + self._replaced
        self._completed: dict[frozenset[int], frozenset[int] | None] = {}

    def dropped(self, chosen: Collection[int]) -> tuple[int, ...]:
        """The layers that leave the model, ascending, of those that the score chose."""
        return tuple(sorted(chosen)[self._replaced :])

    def may_go(self, chosen: Collection[int]) -> bool:
        """Whether these layers, or these with others, can be removed."""
        if len(chosen) < self.count and self.free:
            return True
        return self.completed(chosen) is not None

    @cached_property
    def free(self) -> bool:
        """Whether each layer alone can be removed; of layers of one kind between neighbours of the same kinds one is tried."""
        kinds = ["", *self._known.kinds, ""]
        tried = {tuple(kinds[layer : layer + 3]): layer for layer in self.open}
        return all(self._known.possible([layer]) for layer in tried.values())

    @cached_property
    def assumed(self) -> tuple[int, ...]:
        """Layers that the score could choose, the last ones if they can go.

        Raises:
            ModelError: no set of so many layers can go; says why the last ones cannot.
        """
        found = self.completed(())
        if found is None:
            self._known.config(self.dropped(self.open[-self.count :]))  # raises
        assert found is not None
        return tuple(sorted(found))

    @cached_property
    def note(self) -> str:
        """What restricts the choice, in words; empty if nothing does."""
        if self.free:
            return ""
        why = next(filter(None, (self._known.why_not([layer]) for layer in self.open)), "")
        return f"not every layer can go, because a configuration must describe the result: {why}"

    def completed(self, chosen: Collection[int]) -> frozenset[int] | None:
        """The chosen layers with as many others as are needed, so that they can be removed; None if none was found."""
        key = frozenset(chosen)
        if key not in self._completed:
            self._completed[key] = next((each for each in self._completions(key) if self._possible(each)), None)
        return self._completed[key]

    def _completions(self, chosen: frozenset[int]) -> Iterator[frozenset[int]]:
        """Sets of the right size: runs of neighbours, the last ones first; then one layer after the other."""
        if len(chosen) >= self.count:
            yield chosen
            return
        for first in reversed(range(self.open.start, self.open.stop - self.count + 1)):
            run = frozenset(range(first, first + self.count))
            if chosen <= run:
                yield run
        if self._runs_only:
            return
        grown = chosen
        for layer in reversed(self.open):
            if layer not in grown and (self.free or self._possible(grown | {layer})):
                grown |= {layer}
            if len(grown) == self.count:
                yield grown
                return

    def _possible(self, chosen: Collection[int]) -> bool:
        gone = self.dropped(chosen)
        return not gone or self._known.possible(gone)


def enough_sublayers(sublayers: Sequence[SubLayer], spec: DepthSpec) -> Enough:
    """Tells of removed sub-layers whether they are `drop` or more, or hold `ratio` or more of all targets' weights."""
    if spec.drop is not None:
        wanted = spec.drop
        return lambda gone: len(gone) >= wanted
    least = (spec.ratio or 0.0) * _numel(sublayers)
    return lambda gone: _numel([sublayers[number] for number in gone]) >= least


def _numel(sublayers: Collection[SubLayer]) -> int:
    return sum(target.numel for sublayer in sublayers for target in sublayer.targets)
