"""The search for a configuration: what the numbers in it could mean in a model with fewer layers, until one is right."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .building import NOT_BUILT, built, quiet, unbuilt
from .entries import Edits, Path, entries, entry, may_be_list, may_number, shallower, written
from .original import Built, Original
from .tracing import Skeleton, original_name, traced

RIGHT = (0, 0)
_PAIRS = 60  # pairs of changed entries that are tried at most
_PROBES = 3  # values of an entry that are tried to see whether layers depend on it
_UNBUILT = 10**6  # the distance of a configuration that no model can be built from


@dataclass(frozen=True)
class Attempt:
    """A configuration that was tried.

    Args:
        config: as transformers reads it from the result's config.json; None where it cannot.
        distance: (settings of layers that differ, layers that compute something else); (0, 0) is the right one.
        what: the first difference, in words.
        wrong: places of layers that differ.
        final: whether no other entry can mend it.
        known: whether every layer is of a kind that the original has.
    """

    config: Any
    distance: tuple[int, int]
    what: str = ""
    wrong: frozenset[int] = field(default_factory=frozenset)
    final: bool = False
    known: bool = False


@dataclass
class Relevant:
    """What searches in one configuration have learnt, for later ones.

    Args:
        entries: those of which another value made a shallower model more like the original, or moved layers between kinds.
        looked_for: the kinds of layers that were wrong when such entries were looked for.
    """

    entries: list[Path] = field(default_factory=list)
    looked_for: set[frozenset[int]] = field(default_factory=set)


class Search:
    """The search for the configuration of a model with some layers of the original.

    Args:
        original: the original.
        kept: numbers of the layers that stay, ascending.
        relevant: is filled by the first search that needs it.
    """

    def __init__(self, original: Original, kept: Sequence[int], relevant: Relevant) -> None:
        self._original, self._view, self._kept, self._learnt = original, original.view, list(kept), relevant
        self._before = len(self._view.layers)
        self._dropped = frozenset(range(self._before)) - set(kept)
        self._text = self._view.config.get_text_config()
        self._known: dict[str, Attempt] = {}

    def best(self) -> Attempt:
        """The right configuration, or what one has that only cuts what has one entry per layer."""
        try:
            _ = self._cut
        except NOT_BUILT as error:  # a configuration that does not say by `num_hidden_layers` how many layers it has
            return Attempt(None, (_UNBUILT, 0), unbuilt(error), final=True)
        base = self._tried({})
        if base.distance == RIGHT or base.final:
            return base
        found = self._climbed(base)
        moved = frozenset(self._original.built[self._kept[place]] for place in base.wrong)
        if found.distance != RIGHT and moved not in self._learnt.looked_for:
            self._learnt.looked_for.add(moved)
            self._look_for_entries(base)
            found = self._climbed(base)
        return found if found.distance == RIGHT else base

    def _climbed(self, base: Attempt) -> Attempt:
        """The nearest configuration that is reached by changing one entry after the other, or two at once."""
        edits: Edits = {}
        best = base
        while best.distance != RIGHT:
            for more in (self._steps, self._pairs):
                found = min(more(edits, best), key=lambda each: self._tried(each).distance, default=edits)
                if self._tried(found).distance < best.distance:
                    break
            else:
                return best
            edits, best = found, self._tried(found)
        return best

    def _steps(self, edits: Edits, now: Attempt) -> Iterator[Edits]:
        """The edits with one more entry changed, until one of them is right."""
        for path in self._learnt.entries:
            for value in self._meanings(path, now):
                yield {**edits, path: value}
                if self._tried({**edits, path: value}).distance == RIGHT:
                    return

    def _pairs(self, edits: Edits, now: Attempt) -> Iterator[Edits]:
        """The edits with two more entries changed, until one of them is right; at most `_PAIRS`."""
        left = _PAIRS
        for one, other in itertools.combinations(self._learnt.entries, 2):
            for first in self._meanings(one, now):
                after = self._tried({**edits, one: first})
                for second in self._meanings(other, after):
                    left -= 1
                    if left < 0:
                        return
                    yield {**edits, one: first, other: second}
                    if self._tried({**edits, one: first, other: second}).distance == RIGHT:
                        return

    def _look_for_entries(self, base: Attempt) -> None:
        """Add the entries on which the kinds of layers depend: another value helps, or moves layers between kinds."""
        for path, value in entries(self._text):
            if path not in self._learnt.entries and (may_number(value, self._before) or may_be_list(self._text, path)):
                values = self._meanings(path, base)[:_PROBES]
                tried = [self._tried({path: each}) for each in values]
                if any(each.distance < base.distance or (each.known and each.distance != base.distance) for each in tried):
                    self._learnt.entries.append(path)

    def _meanings(self, path: Path, now: Attempt) -> list[Any]:
        """What an entry could be in the result: numbers of layers, first or last ones counted, a period, an offset."""
        value, kept, before = entry(self._text, path), self._kept, self._before
        if isinstance(value, int):
            gone = before - len(kept)
            first = sum(layer < value for layer in kept)
            last = sum(layer >= before - value for layer in kept)
            near = [first, last, 1, *(value - step for step in range(1, gone + 3)), value + 1, 0]
            return [each for each in dict.fromkeys(near) if each >= 0 and each != value]
        held = list(value or ())
        places = {layer: place for place, layer in enumerate(kept)}
        moved = [places[layer] for layer in held if layer in places]
        found = [moved, *self._kinds_apart(), sorted({*moved, *now.wrong}), sorted(set(moved) - now.wrong), sorted(now.wrong)]
        made = {json.dumps(each): each for each in found}
        return [tuple(each) if isinstance(value, tuple) else each for each in made.values() if each != held]

    def _kinds_apart(self) -> list[list[int]]:
        """The places of the layers with the same modules, one list per kind."""
        apart: dict[str, list[int]] = {}
        for place, layer in enumerate(self._kept):
            apart.setdefault(self._original.modules(self._original.built[layer]), []).append(place)
        return list(apart.values()) if len(apart) > 1 else []

    def _tried(self, edits: Edits) -> Attempt:
        key = repr(sorted((path, repr(value)) for path, value in edits.items()))
        if key not in self._known:
            with quiet():
                self._known[key] = self._compared(self._original.model(f"{self._cut} {key}", lambda: self._config(edits)))
        return self._known[key]

    def _config(self, edits: Edits) -> Any:
        return written(shallower(self._view.config, self._kept, edits))

    @functools.cached_property
    def _cut(self) -> str:
        """The entries of the configuration that only cuts what has one entry per layer; equal for many choices of layers."""
        return repr(list(entries(shallower(self._view.config, self._kept).get_text_config())))

    def _compared(self, found: Built | str) -> Attempt:
        """Compare a configuration's model with the original: first what it is built of, then what it computes."""
        kept = self._kept
        if isinstance(found, str):
            return Attempt(None, (_UNBUILT, 0), found)
        config = found.config
        if len(found.layers) != len(kept):
            return Attempt(config, (_UNBUILT, 0), f"it would have {len(found.layers)} layers, not {len(kept)}")
        if what := self._outside(found):
            return Attempt(config, (_UNBUILT, 0), what, final=True)
        count, what, wrong = 0, "", set[int]()
        for place, layer in enumerate(kept):
            different, first = self._original.apart(self._original.built[layer], found.layers[place], len(kept))
            if different:
                what = what or f"layer {layer}, which would be layer {place}, {first}"
                wrong.add(place)
                count += different
        known = set(self._original.built).issuperset(found.layers)
        return Attempt(config, (count, 0), what, frozenset(wrong), known=known) if count else self._computed(config)

    def _computed(self, config: Any) -> Attempt:
        view, kept = self._view, self._kept
        reference = self._original.trace(self._dropped)
        try:
            model = built(config, view)
            layers = list(model.get_submodule(view.layers_path))
            found = traced(Skeleton(model, config, view.dtype, view.layers_path, layers), kept)
        except NOT_BUILT as error:
            return Attempt(None, (_UNBUILT, 0), unbuilt(error))
        if found.logits == reference.logits:
            return Attempt(config, RIGHT)
        pairs = enumerate(zip(reference.layers, found.layers, strict=False))
        wrong = [place for place, (one, other) in pairs if one != other]
        if not wrong:
            return Attempt(config, (0, 1), "what is between the layers would compute something else")
        what = f"layer {kept[wrong[0]]}, which would be layer {wrong[0]}, would compute something else, as its number changes"
        return Attempt(config, (0, len(wrong)), what, frozenset(wrong))

    def _outside(self, found: Built) -> str:
        """What of the tensors differs in name, shape or sharing from the original's, in words; empty if nothing does."""
        view, path = self._view, self._view.layers_path
        old = self._original.shapes
        new = {original_name(name, path, self._kept): shape for name, shape in found.shapes.items()}
        for name, shape in old.items():
            if name.startswith(path + "."):
                continue
            if name not in new:
                return f"the tensor '{name}' outside the layers would have no place"
            if new[name] != shape:
                return f"'{name}', outside the layers, has shape {shape} and would need {new[name]}"
        if missing := [name for name in new if name not in old and not name.startswith(path + ".")]:
            return f"it would need a tensor '{missing[0]}'"
        own = (original_name(name, path, self._kept) for name in found.own)
        if lent := next((name for name in own if name in view.tied), None):
            return f"'{lent}' has its weights from '{view.tied[lent]}', which would be gone"
        return ""
