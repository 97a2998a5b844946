"""What gets one choice of the budget: a target alone, or a set of targets that the method solves together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..compress.base import Method, Settings
from ..compress.offers import Choice, JointOffer, Offer, Shape
from ..model.targets import Target


@dataclass(frozen=True)
class Item:
    """One item of the budget.

    Args:
        targets: one, or a set in the method's own order.
        parts: what each is to a joint method; None for a target that is solved alone.
    """

    targets: tuple[Target, ...]
    parts: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        """The first target's."""
        return self.targets[0].name

    def shared_out(self, chosen: Offer, offers: Sequence[Offer], dense: Mapping[str, int]) -> dict[str, Offer]:
        """What each target gets where the item got `chosen`.

        Args:
            offers: of this item, `chosen` among them unless it is dense.
            dense: target -> bytes when dense.
        """
        if self.parts is None:
            return {self.name: next((offer for offer in offers if offer.choice == chosen.choice), chosen)}
        if chosen.choice.dense:
            return {target.name: Offer(Choice(), dense[target.name]) for target in self.targets}
        found = next(offer for offer in offers if offer.choice == chosen.choice)
        assert isinstance(found, JointOffer)
        return dict(zip((target.name for target in self.targets), found.members, strict=True))


def items_of(method: Method, settings: Settings, targets: Sequence[Target]) -> list[Item]:
    """The open targets as items, in the order in which a forward reaches the first target of each.

    Raises:
        RecipeError: the settings name roles that no target has.
    """
    if method.joint is None:
        return [Item((target,)) for target in targets]
    by_name = {target.name: target for target in targets}
    member: dict[str, Item] = {}
    for each in method.joint.sets(targets, settings):
        item = Item(tuple(by_name[name] for name in each.names), each.parts)
        if twice := [name for name in each.names if name in member]:
            raise ValueError(f"method {method.name} puts {twice[0]} into two sets")
        member |= dict.fromkeys(each.names, item)
    found = dict.fromkeys(member.get(target.name, Item((target,))) for target in targets)
    return list(found)


def needs_of(method: Method, items: Iterable[Item]) -> dict[str, frozenset[str]]:
    """Target -> the statistics that the method reads of it."""
    return {
        target.name: method.needs_of(part)
        for item in items
        for target, part in zip(item.targets, item.parts or (None,), strict=True)
    }


def shape_of(target: Target, element: int) -> Shape:
    """What the size of a target's forms depends on, `element` bytes per number."""
    return Shape(target.out_features, target.in_features, element, target.bias)


def offers_of(
    items: Iterable[Item], method: Method, settings: Settings, multiple: int, element: int
) -> dict[str, Sequence[Offer]]:
    """Item name -> the ways in which the method can store it; worked out once for items of equal shapes."""
    known: dict[tuple[tuple[Shape, ...], tuple[str, ...] | None], Sequence[Offer]] = {}
    found: dict[str, Sequence[Offer]] = {}
    for item in items:
        shapes = tuple(shape_of(target, element) for target in item.targets)
        key = shapes, item.parts
        if key not in known:
            if item.parts is None:
                known[key] = method.offers(shapes[0], settings, multiple)
            else:
                assert method.joint is not None
                known[key] = method.joint.offers(shapes, item.parts, settings, multiple)
        found[item.name] = known[key]
    return found
