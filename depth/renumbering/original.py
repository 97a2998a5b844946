"""The original model as shallower ones are compared with it: what its layers are built of, and what they compute."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...checkpoint.streamed import Checkpoint
from ...errors import ModelError, one_line
from .building import NOT_BUILT, built, numbered, structures, unbuilt
from .tracing import Trace, traced


@dataclass(frozen=True)
class Built:
    """The model of a configuration.

    Args:
        config: the configuration, as transformers reads it from the result's config.json.
        layers: a number for what each layer is built of.
        shapes: shape of every tensor, by name.
        own: parameters that share their tensor with no earlier one.
    """

    config: Any
    layers: list[int]
    shapes: Mapping[str, tuple[int, ...]]
    own: Sequence[str]


class Original:
    """What is known of a model; everything is found once.

    Args:
        view: the checkpoint; none of its weights may be in memory and none of its modules replaced when something is compared.
    """

    def __init__(self, view: Checkpoint) -> None:
        self.view = view
        self._traces: dict[frozenset[int], Trace] = {}
        self._models: dict[str, Built | str] = {}  # configuration -> the model that it describes, or why there is none
        self._numbers: dict[str, int] = {}  # what a layer is built of -> a number for it
        self._known_kinds: list[dict[str, Any]] = []  # by that number
        self._apart: dict[tuple[int, int, int], tuple[int, str]] = {}

    @functools.cached_property
    def kinds(self) -> list[str]:
        """Of every layer, what it is built of and what it computes; equal for layers that differ in weights only."""
        computed = self.trace(frozenset()).layers
        if len(computed) != len(self.built):  # some layers do not run; nothing is known of what they compute
            return [f"{number} {each}" for number, each in enumerate(self.built)]
        return [f"{trace} {each}" for trace, each in zip(computed, self.built, strict=True)]

    @functools.cached_property
    def built(self) -> list[int]:
        """Of every layer, a number for what it is built of."""
        return self.numbered(self._structures)

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the original, by name."""
        return {name: tuple(tensor.shape) for name, tensor in self.view.model.state_dict().items()}

    @functools.cached_property
    def _structures(self) -> list[dict[str, Any]]:
        return structures(self.view.layers, self.view.config)

    @functools.cached_property
    def _own_numbers(self) -> set[str]:
        return numbered(self._structures)

    def numbered(self, structures: Sequence[Mapping[str, Any]]) -> list[int]:
        """For what each layer is built of, a number; equal ones differ in the layer's own number only."""
        found = []
        for place, each in enumerate(structures):
            held = {key: value for key, value in each.items() if key not in self._own_numbers or value != place}
            key = repr(sorted(held.items(), key=lambda item: item[0]))
            if key not in self._numbers:
                self._numbers[key] = len(self._known_kinds)
                self._known_kinds.append(held)
            found.append(self._numbers[key])
        return found

    def modules(self, kind: int) -> str:
        """The classes of the modules that a layer of this kind is built of."""
        return repr([(key, value) for key, value in self._known_kinds[kind].items() if key.endswith(":")])

    def apart(self, kind: int, other: int, layers: int) -> tuple[int, str]:
        """How many settings of a layer differ from another one's, and the first one in words.

        Args:
            layers: of the other one's model; a setting that is the number of layers may follow it.
        """
        if (kind, other, layers) not in self._apart:
            one, two = self._known_kinds[kind], self._known_kinds[other]
            counts = (len(self.view.layers), layers)
            keys = [key for key in {**one, **two} if one.get(key) != two.get(key) and (one.get(key), two.get(key)) != counts]
            self._apart[kind, other, layers] = len(keys), _difference(keys, one, two)
        return self._apart[kind, other, layers]

    def model(self, key: str, make: Callable[[], Any]) -> Built | str:
        """What the model of a configuration is built of; why it cannot be built if it cannot.

        Args:
            key: equal for equal configurations.
            make: makes the configuration.
        """
        if key not in self._models:
            try:
                config = make()
                model = built(config, self.view)
                layers = list(model.get_submodule(self.view.layers_path))
                tied = set(getattr(model, "all_tied_weights_keys", None) or {})
                shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
                own = [name for name, _ in model.named_parameters() if name not in tied]
                self._models[key] = Built(config, self.numbered(structures(layers, config)), shapes, own)
            except NOT_BUILT as error:
                self._models[key] = unbuilt(error)
        return self._models[key]

    def trace(self, dropped: frozenset[int]) -> Trace:
        """What the original computes while the hidden state skips these layers.

        Raises:
            ModelError: its forward does not run on the meta device.
        """
        if dropped not in self._traces:
            try:
                self._traces[dropped] = traced(self.view, range(len(self.view.layers)), dropped)
            except NOT_BUILT as error:
                raise ModelError(
                    f"{self.view.location.name}: what this model computes cannot be followed without its weights, so that "
                    f"a model with fewer layers cannot be compared with it ({type(error).__name__}: {one_line(error)}).",
                    "Take depth.granularity: sub-layer, which renumbers no layer, or compress without dropping layers.",
                ) from error
        return self._traces[dropped]


def _difference(keys: Sequence[str], one: Mapping[str, Any], two: Mapping[str, Any]) -> str:
    """The first of the different settings of two layers, in words; a module of another class comes before a setting."""
    if not keys:
        return ""
    key = next((key for key in keys if key.endswith(":") and key != "cache:"), keys[0])
    module, _, setting = key.rpartition(":")
    was, now = one.get(key, "nothing"), two.get(key, "nothing")
    if key == "cache:":
        return f"has a cache {was} and would get {now}"
    if not setting:
        return f"is {was} and would be {now}" if not module else f"has {was} at '{module}' and would get {now}"
    return f"has {setting} = {was} at '{module or 'the layer'}' and would get {now}"
