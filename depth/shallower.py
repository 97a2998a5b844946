"""The configuration of a model without some of its layers, found by comparison with the original.

A configuration says in many ways what depends on a layer's number: lists with one entry per layer, lists of layers' numbers, the
number of the first layers of another kind, periods. lrc knows none of these by name. It cuts what has one entry per layer; where
the model that this describes is another one than the original without those layers, it tries what the numbers in the
configuration could mean, until every layer that stays is built as it was (modules, shapes, settings) and the whole model
computes what the original computes while the hidden state skips the dropped layers (depth/tracing.py). Every comparison is made
with models on the meta device, before any weight is read.

What no configuration describes is refused: per-layer tables outside the layers, products that are scaled by the layer's number,
keys and values that a dropped layer computes for others, kinds of layers at a fixed period that would come out of step.
"""

from __future__ import annotations

import copy
import functools
import json
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from huggingface_hub.errors import StrictDataclassError
from torch.overrides import TorchFunctionMode

from ..checkpoint.streamed import Checkpoint
from ..compress.forms.experts import IMPLEMENTATION
from ..errors import ModelError, one_line
from .tracing import Skeleton, Trace, original_name, structure, traced

Path = tuple[str, ...]  # keys that lead to an entry of a configuration
Edits = Mapping[Path, Any]
_PAIRS = 40  # pairs of changed entries that are tried at most
_PROBES = 3  # values of an entry that are tried to see whether layers depend on it
_UNBUILT = 10**6  # the distance of a configuration that no model can be built from
_NOT_BUILT: tuple[type[Exception], ...] = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError)
_NOT_BUILT += (AssertionError, StopIteration, StrictDataclassError)
_DRAWN = {"normal_", "uniform_", "zero_", "fill_", "copy_", "erfinv_", "clamp_", "mul_", "add_"}


@dataclass(frozen=True)
class _Attempt:
    """A configuration that was tried.

    Args:
        config: as transformers reads it from the result's config.json; None where it cannot.
        distance: (settings of layers that differ, layers that compute something else); (0, 0) is the right one.
        what: the first difference, in words.
        wrong: places of layers that differ.
        final: whether no other entry can mend it.
    """

    config: Any
    distance: tuple[int, int]
    what: str = ""
    wrong: frozenset[int] = field(default_factory=frozenset)
    final: bool = False


@dataclass(frozen=True)
class _Built:
    """The model of a configuration.

    Args:
        layers: a number for what each layer is built of.
        shapes: shape of every tensor, by name.
        own: parameters that share their tensor with no earlier one.
    """

    layers: list[int]
    shapes: Mapping[str, tuple[int, ...]]
    own: Sequence[str]


class Shallower:
    """The configurations of one model without layers; what was compared once is known from then on.

    Args:
        view: the checkpoint; none of its weights may be in memory and none of its modules replaced when something is compared.
    """

    def __init__(self, view: Checkpoint) -> None:
        self._view = view
        self._traces: dict[frozenset[int], Trace] = {}
        self._found: dict[frozenset[int], _Attempt] = {}
        self._alike: dict[tuple[str, ...], bool] = {}
        self._relevant: list[Path] | None = None  # entries that make a shallower model more like the original
        self._others: list[Path] = []  # other entries that concern some layers only
        self._models: dict[str, _Built | str] = {}  # configuration -> the model that it describes, or why there is none
        self._numbers: dict[str, int] = {}  # what a layer is built of -> a number for it
        self._known_kinds: list[dict[str, Any]] = []  # by that number
        self._apart: dict[tuple[int, int, int], tuple[int, tuple[str, Any, Any]]] = {}

    @classmethod
    def of(cls, view: Checkpoint) -> Shallower:
        """The one of this checkpoint."""
        return _MADE.setdefault(view, cls(view)) if view not in _MADE else _MADE[view]

    def config(self, dropped: Collection[int]) -> Any:
        """The configuration of the model without these layers.

        Raises:
            ModelError: no configuration describes it; says what would differ.
        """
        found = self._attempt(frozenset(dropped))
        if found.distance != (0, 0):
            raise ModelError(
                f"{self._view.location.name}: without {_said(dropped)} the model is none that a {self._view.config.model_type} "
                f"configuration describes: {found.what}.{self._settings()}",
                "Drop other layers or another number of them, or take depth.granularity: sub-layer, which renumbers no layer.",
            )
        return found.config

    def possible(self, dropped: Collection[int]) -> bool:
        """Whether a configuration describes the model without these layers; equal sequences of kinds have one answer."""
        key = tuple(kind for layer, kind in enumerate(self.kinds) if layer not in dropped)
        if key not in self._alike:
            self._alike[key] = self._attempt(frozenset(dropped)).distance == (0, 0)
        return self._alike[key]

    def why_not(self, dropped: Collection[int]) -> str:
        """What would differ without these layers; empty if nothing would."""
        found = self._attempt(frozenset(dropped))
        return "" if found.distance == (0, 0) else found.what

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
        return {name: tuple(tensor.shape) for name, tensor in self._view.model.state_dict().items()}

    @functools.cached_property
    def _structures(self) -> list[dict[str, Any]]:
        return _structures(self._view.layers, self._view.config)

    @functools.cached_property
    def _own_numbers(self) -> set[str]:
        return _numbered(self._structures)

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
            counts = (len(self._view.layers), layers)
            keys = [key for key in {**one, **two} if one.get(key) != two.get(key) and (one.get(key), two.get(key)) != counts]
            self._apart[kind, other, layers] = len(keys), _difference(keys, one, two)
        return self._apart[kind, other, layers]

    def model(self, config: Any) -> _Built | str:
        """What the model of a configuration is built of; why it cannot be built if it cannot."""
        key = json.dumps(config.to_dict(), default=repr, sort_keys=True)
        if key not in self._models:
            try:
                model = built(config, self._view)
                layers = list(model.get_submodule(self._view.layers_path))
                tied = set(getattr(model, "all_tied_weights_keys", None) or {})
                shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
                own = [name for name, _ in model.named_parameters() if name not in tied]
                self._models[key] = _Built(self.numbered(_structures(layers, config)), shapes, own)
            except _NOT_BUILT as error:
                self._models[key] = _unbuilt(error)
        return self._models[key]

    def trace(self, dropped: frozenset[int]) -> Trace:
        """What the original computes while the hidden state skips these layers."""
        if dropped not in self._traces:
            self._traces[dropped] = traced(self._view, range(len(self._view.layers)), dropped)
        return self._traces[dropped]

    def _attempt(self, dropped: frozenset[int]) -> _Attempt:
        if dropped not in self._found:
            kept = [layer for layer in range(len(self._view.layers)) if layer not in dropped]
            self._found[dropped] = _Search(self, kept).best() if dropped else _Attempt(self._view.config, (0, 0))
        return self._found[dropped]

    def _settings(self) -> str:
        text = self._view.config.get_text_config()
        named = [f"{'.'.join(path)} {_entry(text, path)}" for path in self._relevant or ()]
        return f" The kinds of layers follow from {', '.join(named)}." if named else ""


_MADE: WeakKeyDictionary[Checkpoint, Shallower] = WeakKeyDictionary()


class _Search:
    """The search for the configuration of the model with these layers (numbers in the original, ascending)."""

    def __init__(self, owner: Shallower, kept: Sequence[int]) -> None:
        self._owner, self._view, self._kept = owner, owner._view, list(kept)
        self._before = len(owner._view.layers)
        self._dropped = frozenset(range(self._before)) - set(kept)
        self._text = owner._view.config.get_text_config()
        self._known: dict[str, _Attempt] = {}

    def best(self) -> _Attempt:
        """The right configuration, or the nearest one."""
        edits: dict[Path, Any] = {}
        base = best = self._tried(edits)
        while best.distance != (0, 0) and not best.final:
            found = min(self._steps(edits, best), key=lambda each: self._tried(each).distance, default=edits)
            if self._tried(found).distance >= best.distance:
                found = min(self._pairs(edits, best), key=lambda each: self._tried(each).distance, default=edits)
            if self._tried(found).distance >= best.distance:
                return base
            edits, best = dict(found), self._tried(found)
        return best

    def _steps(self, edits: Edits, now: _Attempt) -> Iterator[Edits]:
        """The edits with one more entry changed, until one of them is right."""
        for path in self._relevant():
            for value in self._meanings(path, now):
                yield {**edits, path: value}
                if self._tried({**edits, path: value}).distance == (0, 0):
                    return

    def _pairs(self, edits: Edits, now: _Attempt) -> Iterator[Edits]:
        """The edits with two more entries changed, until one of them is right."""
        left = _PAIRS
        paths = self._relevant()
        for place, one in enumerate(paths):
            for other in paths[place + 1 :]:
                for first in self._meanings(one, now):
                    after = self._tried({**edits, one: first})
                    for second in self._meanings(other, after):
                        left -= 1
                        if left < 0:
                            return
                        yield {**edits, one: first, other: second}
                        if self._tried({**edits, one: first, other: second}).distance == (0, 0):
                            return

    def _relevant(self) -> list[Path]:
        """Entries on which the kinds of layers depend, found once by changing each of them."""
        if self._owner._relevant is None:
            base, found, others = self._tried({}), list[Path](), list[Path]()
            for path, value in _entries(self._text):
                if not _may_number(value, self._before) and not _may_be_list(self._text, path):
                    continue
                tried = [self._tried({path: each}).distance for each in self._meanings(path, base)[:_PROBES]]
                if any(each < base.distance for each in tried):
                    found.append(path)
                elif any(self._moves_layers({path: each}, base) for each in self._meanings(path, base)[:_PROBES]):
                    others.append(path)
            self._owner._relevant, self._owner._others = found, others
        return self._owner._relevant + self._owner._others

    def _moves_layers(self, edits: Edits, base: _Attempt) -> bool:
        """Whether edits build some layers differently than the base does, but not all."""
        tried = self._tried(edits)
        return tried.distance[0] < _UNBUILT and tried.distance != base.distance and len(tried.wrong) < len(self._kept)

    def _meanings(self, path: Path, now: _Attempt) -> list[Any]:
        """What an entry could be in the result: numbers of layers, first or last ones counted, a period, an offset."""
        value, kept, before = _entry(self._text, path), self._kept, self._before
        if isinstance(value, int):
            gone = before - len(kept)
            first = sum(layer < value for layer in kept)
            last = sum(layer >= before - value for layer in kept)
            near = [first, last, 1, *(value - step for step in range(1, gone + 3)), value + 1, 0]
            return [each for each in dict.fromkeys(near) if each >= 0 and each != value]
        held = list(value or ())
        places = {layer: place for place, layer in enumerate(kept)}
        moved = [places[layer] for layer in held if layer in places]
        found = [moved, sorted({*moved, *now.wrong}), sorted(set(moved) - now.wrong), sorted(now.wrong)]
        found += [places for places in self._kinds_apart()]
        made = {json.dumps(each): each for each in found}
        return [tuple(each) if isinstance(value, tuple) else each for each in made.values() if each != held]

    def _kinds_apart(self) -> list[list[int]]:
        """The places of the layers with the same modules, one list per kind."""
        apart: dict[str, list[int]] = {}
        for place, layer in enumerate(self._kept):
            apart.setdefault(self._owner.modules(self._owner.built[layer]), []).append(place)
        return list(apart.values()) if len(apart) > 1 else []

    def _tried(self, edits: Edits) -> _Attempt:
        key = repr(sorted((path, repr(value)) for path, value in edits.items()))
        if key not in self._known:
            with quiet():
                try:
                    config = _written(shallower(self._view.config, self._kept, edits))
                except _NOT_BUILT as error:
                    self._known[key] = _Attempt(None, (_UNBUILT, 0), _unbuilt(error))
                else:
                    self._known[key] = self._compared(config)
        return self._known[key]

    def _compared(self, config: Any) -> _Attempt:
        """Compare a configuration's model with the original: first what it is built of, then what it computes."""
        found, kept = self._owner.model(config), self._kept
        if isinstance(found, str):
            return _Attempt(None, (_UNBUILT, 0), found)
        if len(found.layers) != len(kept):
            return _Attempt(config, (_UNBUILT, 0), f"it would have {len(found.layers)} layers, not {len(kept)}")
        if what := self._outside(found):
            return _Attempt(config, (_UNBUILT, 0), what, final=True)
        count, what, wrong = 0, "", set[int]()
        for place, layer in enumerate(kept):
            different, first = self._owner.apart(self._owner.built[layer], found.layers[place], len(kept))
            if different:
                what = what or f"layer {layer}, which would be layer {place}, {first}"
                wrong.add(place)
                count += different
        return _Attempt(config, (count, 0), what, frozenset(wrong)) if count else self._computed(config)

    def _computed(self, config: Any) -> _Attempt:
        view, kept = self._view, self._kept
        reference = self._owner.trace(self._dropped)
        try:
            model = built(config, view)
            layers = list(model.get_submodule(view.layers_path))
            found = traced(Skeleton(model, config, view.dtype, view.layers_path, layers), kept)
        except _NOT_BUILT as error:
            return _Attempt(None, (_UNBUILT, 0), _unbuilt(error))
        if found.logits == reference.logits:
            return _Attempt(config, (0, 0))
        pairs = enumerate(zip(reference.layers, found.layers, strict=False))
        wrong = [place for place, (one, other) in pairs if one != other]
        if not wrong:
            return _Attempt(config, (0, 1), "what is between the layers would compute something else")
        what = f"layer {kept[wrong[0]]}, which would be layer {wrong[0]}, would compute something else, as its number changes"
        return _Attempt(config, (0, len(wrong)), what, frozenset(wrong))

    def _outside(self, found: _Built) -> str:
        """What of the tensors differs in name, shape or sharing from the original's, in words; empty if nothing does."""
        view, path = self._view, self._view.layers_path
        old = self._owner.shapes
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


def shallower(config: Any, layers: Sequence[int], edits: Edits | None = None) -> Any:
    """A copy of a configuration with fewer layers; everything that has one entry per layer is cut.

    Args:
        config: a transformers configuration.
        layers: numbers of the original layers that are kept, ascending.
        edits: entries that are given another value.
    """
    cut = copy.deepcopy(config)
    text = cut.get_text_config()
    before = text.num_hidden_layers
    if len(layers) == before:
        return cut
    for path, value in list(_entries(text)):
        if isinstance(value, list | tuple) and len(value) == before:
            _put(text, path, type(value)(value[layer] for layer in layers))
        elif isinstance(value, dict) and value and all(_is_layer(key, before) for key in value):
            moved = {int(key): entry for key, entry in value.items()}
            whole = type(next(iter(value)))
            _put(text, path, {whole(new): moved[old] for new, old in enumerate(layers) if old in moved})
    text.num_hidden_layers = len(layers)
    for path, value in (edits or {}).items():
        _put(text, path, value)
    return cut


def _is_layer(key: Any, layers: int) -> bool:
    return str(key).isdigit() and int(key) < layers


def _entries(config: Any) -> Iterator[tuple[Path, Any]]:
    """(path, value) of the entries of a configuration, and of the configurations and dictionaries in it."""
    held = config if isinstance(config, dict) else vars(config)
    for key, value in list(held.items()):
        if not isinstance(key, str) or key.startswith("_"):
            continue
        yield (key,), value
        if isinstance(value, dict) or hasattr(value, "to_dict"):
            yield from (((key, *path), each) for path, each in _entries(value))


def _entry(config: Any, path: Path) -> Any:
    for key in path:
        config = config[key] if isinstance(config, dict) else getattr(config, key)
    return config


def _put(config: Any, path: Path, value: Any) -> None:
    holder = _entry(config, path[:-1])
    if isinstance(holder, dict):
        holder[path[-1]] = value
    else:
        setattr(holder, path[-1], value)


def _may_number(value: Any, layers: int) -> bool:
    """Whether a value could be a number of layers, or a list of layers' numbers."""
    if isinstance(value, list | tuple):
        return all(type(each) is int and 0 <= each < layers for each in value) and len(set(value)) == len(value)
    return type(value) is int and 0 <= value <= layers


def _may_be_list(config: Any, path: Path) -> bool:
    """Whether an entry that is None could be a list of numbers, by the annotation of the configuration's class."""
    holder = _entry(config, path[:-1])
    if isinstance(holder, dict) or _entry(config, path) is not None:
        return False
    notes = [str(kind.__dict__.get("__annotations__", {}).get(path[-1], "")) for kind in type(holder).__mro__]
    return any("list[int]" in note for note in notes)


def _written(config: Any) -> Any:
    """The configuration as transformers will read it from the result's config.json."""
    entries = type(config)._decode_special_floats(json.loads(config.to_json_string()))
    read = type(config).from_dict(entries)
    read._name_or_path = config._name_or_path
    return read


def built(config: Any, view: Checkpoint) -> Any:
    """The model with parameters on the meta device; buffers are computed."""
    from accelerate import init_empty_weights

    config._experts_implementation = IMPLEMENTATION
    with init_empty_weights(include_buffers=False), _Undrawn():
        model = type(view.model)._from_config(config, dtype=view.dtype)
    model.tie_weights()
    model.eval()
    model.requires_grad_(False)
    return model


class _Undrawn(TorchFunctionMode):
    """While the context is open, parameters on the meta device are not initialised, which takes most of a model's building."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Leave out what only sets values that a tensor on the meta device does not have."""
        given = kwargs or {}
        if getattr(func, "__name__", "") in _DRAWN:
            tensor = args[0] if args else given.get("tensor")  # torch.nn.init names it
            if tensor is not None and tensor.is_meta:
                return tensor
        return func(*args, **given)


def _structures(layers: Sequence[Any], config: Any) -> list[dict[str, Any]]:
    """What every layer is built of, and the kind of its cache where there is one for each layer."""
    found = [structure(layer) for layer in layers]
    for each, cache in zip(found, _caches(config, len(layers)), strict=False):
        each["cache:"] = cache
    return found


def _caches(config: Any, layers: int) -> list[Any]:
    from transformers import DynamicCache

    try:
        made = DynamicCache(config=config).layers
    except _NOT_BUILT:
        return []  # a model that makes its cache in another way
    return [(type(each).__qualname__, getattr(each, "sliding_window", None)) for each in made] if len(made) == layers else []


def _numbered(structures: Sequence[Mapping[str, Any]]) -> set[str]:
    """Settings that are the layer's own number in every layer that has them, such as `self_attn:layer_idx`."""
    found = set[str]()
    for key in {key for each in structures for key in each}:
        held = [(place, each[key]) for place, each in enumerate(structures) if key in each]
        named = any(word in key.rpartition(":")[2] for word in ("layer", "idx"))
        if (len(held) > 1 or named) and all(type(value) is int and value == place for place, value in held):
            found.add(key)
    return found


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


def _unbuilt(error: Exception) -> str:
    return f"transformers cannot build or run the model of its configuration ({type(error).__name__}: {one_line(error)})"


def _said(layers: Collection[int]) -> str:
    named = ", ".join(map(str, sorted(layers)))
    return f"layer {named}" if len(layers) == 1 else f"layers {named}"


class quiet(warnings.catch_warnings):
    """While the context is open, configurations that are only tried give no warning."""

    def __enter__(self) -> Any:
        from transformers.utils import logging

        found = super().__enter__()
        warnings.simplefilter("ignore")
        self._level = logging.get_verbosity()
        logging.set_verbosity_error()
        return found

    def __exit__(self, *args: Any) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self._level)
        super().__exit__(*args)
