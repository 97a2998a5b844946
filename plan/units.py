"""What gets one choice of the budget: a target alone, or a set of targets that the method solves together."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..compress.base import Method, Settings
from ..compress.options import Choice, JointOption, Option, Shape
from ..model.targets import Target


@dataclass(frozen=True)
class Unit:
    """One unit of the budget.

    Args:
        targets: one, or a set in the method's own order.
        slots: which slot of the unit each fills, in the words of the joint method; None for a target that is solved alone.
    """

    targets: tuple[Target, ...]
    slots: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        """The first target's."""
        return self.targets[0].name

    def without(self, names: Collection[str]) -> Unit:
        """The unit without the targets of these names."""
        kept = [number for number, target in enumerate(self.targets) if target.name not in names]
        slots = None if self.slots is None else tuple(self.slots[number] for number in kept)
        return Unit(tuple(self.targets[number] for number in kept), slots)

    def shared_out(self, chosen: Option, options: Sequence[Option], dense: Mapping[str, int]) -> dict[str, Option]:
        """What each target gets where the unit got `chosen`.

        Args:
            options: of this unit, `chosen` among them unless it is dense.
            dense: target -> bytes when dense.
        """
        if self.slots is None:
            return {self.name: next((option for option in options if option.choice == chosen.choice), chosen)}
        if chosen.choice.dense:
            return {target.name: Option(Choice(), dense[target.name]) for target in self.targets}
        found = next(option for option in options if option.choice == chosen.choice)
        assert isinstance(found, JointOption)
        return dict(zip((target.name for target in self.targets), found.members, strict=True))


def units_of(method: Method, settings: Settings, targets: Sequence[Target]) -> list[Unit]:
    """The open targets as units, in the order in which a forward reaches the first target of each.

    Raises:
        RecipeError: the settings name roles that no target has.
    """
    if method.joint is None:
        return [Unit((target,)) for target in targets]
    by_name = {target.name: target for target in targets}
    member: dict[str, Unit] = {}
    for each in method.joint.units(targets, settings):
        unit = Unit(tuple(by_name[name] for name in each.names), each.slots)
        if twice := [name for name in each.names if name in member]:
            raise ValueError(f"method {method.name} puts {twice[0]} into two units")
        member |= dict.fromkeys(each.names, unit)
    found = dict.fromkeys(member.get(target.name, Unit((target,))) for target in targets)
    return list(found)


def needs_of(method: Method, units: Iterable[Unit]) -> dict[str, frozenset[str]]:
    """Target -> the statistics that the method reads of it."""
    return {
        target.name: method.needs_of(slot)
        for unit in units
        for target, slot in zip(unit.targets, unit.slots or (None,), strict=True)
    }


def shape_of(target: Target, element: int) -> Shape:
    """What the size of a target's forms depends on, `element` bytes per number."""
    return Shape(target.out_features, target.in_features, element, target.bias)


def options_of(
    units: Iterable[Unit], method: Method, settings: Settings, multiple: int, element: int
) -> dict[str, Sequence[Option]]:
    """Item name -> the ways in which the method can store it; worked out once for units of equal shapes."""
    known: dict[tuple[tuple[Shape, ...], tuple[str, ...] | None], Sequence[Option]] = {}
    found: dict[str, Sequence[Option]] = {}
    for unit in units:
        shapes = tuple(shape_of(target, element) for target in unit.targets)
        key = shapes, unit.slots
        if key not in known:
            if unit.slots is None:
                known[key] = method.options(shapes[0], settings, multiple)
            else:
                assert method.joint is not None
                known[key] = method.joint.options(shapes, unit.slots, settings, multiple)
        found[unit.name] = known[key]
    return found
