"""The configuration of a model without some of its layers, found by comparison with the original.

A configuration says in many ways what depends on a layer's number: lists with one entry per layer, lists of layers' numbers,
the number of the first layers of another kind, periods. lrc knows none of these by name. It cuts what has one entry per layer.
Where the model that this describes is another one than the original without those layers, it tries what the numbers in the
configuration could mean, until every layer that stays is built as it was (modules, shapes, settings) and the whole model
computes what the original computes while the hidden state skips the dropped layers (tracing.py). All models that are compared
are on the meta device; no weight is read.

What no configuration describes is refused: per-layer tables outside the layers, products that are scaled by the layer's number,
keys and values that a dropped layer computes for others, kinds of layers at a fixed period that would come out of step.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ...checkpoint.streamed import Checkpoint
from ...errors import ModelError
from .entries import entry
from .original import Original
from .search import RIGHT, Attempt, Relevant, Search

_KNOWN = "_shallower"  # the attribute of a checkpoint that keeps what is known of it, for as long as it lives


class Shallower:
    """The configurations of one model without layers; what was compared once is known from then on.

    Args:
        view: the checkpoint; none of its weights may be in memory and none of its modules replaced when something is compared.
    """

    def __init__(self, view: Checkpoint) -> None:
        self._original = Original(view)
        self._relevant = Relevant()
        self._found: dict[frozenset[int], Attempt] = {}
        self._alike: dict[tuple[str, ...], bool] = {}

    @classmethod
    def of(cls, view: Checkpoint) -> Shallower:
        """The one of this checkpoint, which keeps it."""
        known = vars(view)
        if _KNOWN not in known:
            known[_KNOWN] = cls(view)
        held: Shallower = known[_KNOWN]
        return held

    @property
    def kinds(self) -> list[str]:
        """Of every layer, what it is built of and what it computes; equal for layers that differ in weights only."""
        return self._original.kinds

    def config(self, dropped: Collection[int]) -> Any:
        """The configuration of the model without these layers.

        Raises:
            ModelError: no configuration describes it; says what would differ.
        """
        found = self._attempt(frozenset(dropped))
        if found.distance != RIGHT:
            view = self._original.view
            raise ModelError(
                f"{view.location.name}: without {_said(dropped)} the model is none that a configuration of type "
                f"'{view.config.model_type}' describes: {found.what}.{self._settings()}",
                "Drop other layers or another number of them, or take depth.granularity: sub-layer, which renumbers no layer.",
            )
        return found.config

    def possible(self, dropped: Collection[int]) -> bool:
        """Whether a configuration describes the model without these layers; equal sequences of kinds have one answer."""
        key = tuple(kind for layer, kind in enumerate(self._original.kinds) if layer not in dropped)
        if key not in self._alike:
            self._alike[key] = self._attempt(frozenset(dropped)).distance == RIGHT
        return self._alike[key]

    def why_not(self, dropped: Collection[int]) -> str:
        """What would differ without these layers; empty if nothing would."""
        found = self._attempt(frozenset(dropped))
        return "" if found.distance == RIGHT else found.what

    def _attempt(self, dropped: frozenset[int]) -> Attempt:
        if dropped not in self._found:
            view = self._original.view
            kept = [layer for layer in range(len(view.layers)) if layer not in dropped]
            search = Search(self._original, kept, self._relevant)
            self._found[dropped] = search.best() if dropped else Attempt(view.config, RIGHT)
        return self._found[dropped]

    def _settings(self) -> str:
        text = self._original.view.config.get_text_config()
        named = [f"{'.'.join(path)} {entry(text, path)}" for path in self._relevant.entries]
        return f" The kinds of layers follow from {', '.join(named)}." if named else ""


def _said(layers: Collection[int]) -> str:
    named = ", ".join(map(str, sorted(layers)))
    return f"layer {named}" if len(layers) == 1 else f"layers {named}"
