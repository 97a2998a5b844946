"""Units: the budget makes one choice for each unit, which is one target or several targets that are solved together."""

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
        targets: one target, or several in the order that the joint method expects.
        slots: slot of each target in the unit, as the joint method names its slots; None for a target that is solved alone.
    """

    targets: tuple[Target, ...]
    slots: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        """Name of the first target."""
        return self.targets[0].name

    def without(self, names: Collection[str]) -> Unit:
        """The same unit without the targets with these names."""
        kept = [number for number, target in enumerate(self.targets) if target.name not in names]
        slots = None if self.slots is None else tuple(self.slots[number] for number in kept)
        return Unit(tuple(self.targets[number] for number in kept), slots)

    def shared_out(self, chosen: Option, options: Sequence[Option], dense: Mapping[str, int]) -> dict[str, Option]:
        """Split the unit's chosen option into one option per target.

        Args:
            options: options of this unit; they include `chosen` unless `chosen` is dense.
            dense: dense bytes of each target, by name.
        """
        if self.slots is None:
            return {self.name: next((option for option in options if option.choice == chosen.choice), chosen)}
        if chosen.choice.dense:
            return {target.name: Option(Choice(), dense[target.name]) for target in self.targets}
        found = next(option for option in options if option.choice == chosen.choice)
        assert isinstance(found, JointOption)
        return dict(zip((target.name for target in self.targets), found.members, strict=True))


def units_of(method: Method, settings: Settings, targets: Sequence[Target]) -> list[Unit]:
    """Group the open targets into units, in the order in which the forward pass reaches the first target of each unit.

    Raises:
        RecipeError: the settings name a role that no open target has.
        ValueError: the method puts one target into two units.
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


def sharing_inputs(units: Iterable[Unit]) -> list[list[Unit]]:
    """Neighbouring units with targets that read the same input, together: they share its statistics."""
    found: list[tuple[set[str], list[Unit]]] = []
    for unit in units:
        inputs = {target.group for target in unit.targets}
        if found and found[-1][0] & inputs:
            found[-1][0].update(inputs)
            found[-1][1].append(unit)
        else:
            found.append((inputs, [unit]))
    return [together for _, together in found]


def needs_of(method: Method, units: Iterable[Unit]) -> dict[str, frozenset[str]]:
    """The statistics that the method needs for each target, by target name."""
    return {
        target.name: method.needs_of(slot)
        for unit in units
        for target, slot in zip(unit.targets, unit.slots or (None,), strict=True)
    }


def shape_of(target: Target, element: int) -> Shape:
    """The shape of a target, which determines the bytes of its forms; a dense number takes `element` bytes."""
    return Shape(target.out_features, target.in_features, element, target.bias)


def options_of(
    units: Iterable[Unit], method: Method, settings: Settings, multiple: int, element: int
) -> dict[str, Sequence[Option]]:
    """The options of each unit, by unit name; computed once for units of equal shapes.

    Args:
        multiple: all ranks are multiples of this number.
        element: bytes of one number in the checkpoint's dtype.
    """
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
