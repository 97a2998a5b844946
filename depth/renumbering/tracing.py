"""What a model computes, as one hash: two models with equal hashes compute the same from the same weights.

A forward of a few tokens runs with the layers on the meta device, and every operation is noted. A tensor's hash is made of the
operation and the hashes of its arguments; that of a weight is its name in the original model, that of a number is the number.
So the hash of the logits says which operations lead to them, whatever the model's code is: a layer's number that scales a
product, a mask that depends on the layer, keys and values that a layer takes from an earlier one, all change it. Attention runs
by its plain formula (`eager`), in which every mask is a tensor.

No weight is read. The work is that of a forward of four tokens without any arithmetic.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ...compress.forms.experts import expert_parameters
from ...model.lockstep import Call, passed_by, run_layer
from ...model.targets import standing_in

_META = torch.device("meta")
_INTERNAL = {*vars(nn.Module()), "forward"}
_ATTENTION = "eager"


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device, as `standing_in` takes it.

    Args:
        model: its parameters have shapes but no values.
        config: its configuration.
        dtype: of its parameters.
        layers_path: the path of the list of layers.
        layers: the layers.
    """

    model: Any
    config: Any
    dtype: torch.dtype
    layers_path: str
    layers: Sequence[nn.Module]

    def tie(self) -> None:
        """Tie what is tied, as a checkpoint does."""
        self.model.tie_weights(recompute_mapping=False)


@dataclass(frozen=True)
class Trace:
    """What a forward computes.

    Args:
        layers: one hash for each layer that runs: what it makes of its input, whatever that is.
        logits: a hash of the whole computation.
    """

    layers: tuple[str, ...]
    logits: str


def traced(skeleton: Any, numbers: Sequence[int], dropped: Collection[int] = ()) -> Trace:
    """Trace a forward of a model.

    Args:
        skeleton: a `Skeleton`, or a checkpoint none of whose weights is in memory.
        numbers: the original model's number of each layer; weights get the original's names.
        dropped: places of layers that the hidden state skips.
    """
    recorder = _Recorder()
    kinds: dict[int, str] = {}
    layers, model = skeleton.layers, skeleton.model
    with (
        torch.no_grad(),
        standing_in(skeleton, through_head=True) as start,
        _plain_attention(model),
        recorder.naming(skeleton, numbers),
    ):
        for place, layer in enumerate(layers):
            layer.forward = _noted(recorder, layer, numbers[place], place in dropped, kinds)
        try:
            with recorder:
                logits = model(**start, use_cache=False).logits
                found = recorder.hash_of(logits)
        finally:
            for layer in layers:
                del layer.forward
    return Trace(tuple(kinds[number] for number in numbers if number in kinds), found)


def structure(layer: nn.Module) -> dict[str, Any]:
    """Everything about a layer that is no weight: (path, attribute) as text -> value, with classes, shapes and settings."""
    found: dict[str, Any] = {}
    for path, module in layer.named_modules():
        found[f"{path}:"] = type(module).__qualname__
        for name, value in vars(module).items():
            if name not in _INTERNAL:
                found[f"{path}:{name}"] = _settled(value)
        for name, parameter in module.named_parameters(recurse=False):
            found[f"{path}:{name}"] = (tuple(parameter.shape), str(parameter.dtype))
        for name, buffer in module.named_buffers(recurse=False):
            found[f"{path}:{name}"] = (tuple(buffer.shape), "" if name in _stored(module) else _value(buffer))
    return found


def _settled(value: Any, inside: bool = False) -> Any:
    """A setting as a value that can be compared; of what holds the whole configuration, and of modules, the type only."""
    if value is None or isinstance(value, bool | int | float | str | Enum | torch.dtype):
        return value
    if isinstance(value, list | tuple):
        return tuple(_settled(each, inside) for each in value)
    if isinstance(value, set | frozenset):
        return tuple(sorted(map(repr, value)))
    if isinstance(value, dict):
        return tuple(sorted(((repr(key), _settled(each, inside)) for key, each in value.items()), key=repr))
    if isinstance(value, Tensor):
        return tuple(value.shape), _value(value)
    held = getattr(value, "__dict__", None)
    if inside or not held or isinstance(value, nn.Module | type) or hasattr(value, "to_dict") or callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return type(value).__qualname__, tuple((name, _settled(each, inside=True)) for name, each in held.items())


def _stored(module: nn.Module) -> set[str]:
    """Names of the buffers that a checkpoint holds; their values are weights."""
    return set(module._buffers) - module._non_persistent_buffers_set


def _value(tensor: Tensor) -> str:
    if tensor.is_meta:
        return "meta"
    held = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(held, digest_size=16).hexdigest()


def _hashed(*parts: Any) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


class _Recorder(TorchDispatchMode):
    """Gives every tensor of a forward a hash of how it was computed.

    What a layer computes is hashed as if its input were always the same, so that layers can be compared. A tensor that leaves a
    layer by another way than its output carries the number of the layer and the hash of its input.
    """

    def __init__(self) -> None:
        super().__init__()
        self._hashes: dict[int, tuple[str, str]] = {}  # id of a tensor -> (its hash, the layer's call that computed it)
        self._written: dict[int, str] = {}  # storage -> hash of what was written into it since its tensors were made
        self._alive: list[Tensor] = []  # an id is that of one tensor only while that tensor lives
        self.call = ""  # which layer runs, and on what; empty outside the layers

    def put(self, tensor: Tensor, value: str, call: str | None = None) -> None:
        """Say what a tensor is; `call` is the layer's call that it belongs to, the present one by default."""
        self._alive.append(tensor)
        self._hashes[id(tensor)] = value, self.call if call is None else call

    def hash_of(self, tensor: Tensor) -> str:
        """A tensor's hash; a tensor that no noted operation computed is known by its values."""
        if id(tensor) not in self._hashes:
            self.put(tensor, _hashed("value", tuple(tensor.shape), str(tensor.dtype), _value(tensor)), "")
        value, call = self._hashes[id(tensor)]
        if written := self._written.get(_storage(tensor)):
            value = _hashed(value, written)
        return value if call in ("", self.call) else _hashed("from", call, value)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Run an operation and note what it computes."""
        named = dict(kwargs or {})
        done = _hashed(str(func), self._said(args), self._said(named))
        output = func(*args, **named)
        given = {id(leaf) for leaf in tree_leaves((args, named)) if isinstance(leaf, Tensor)}
        for place, leaf in enumerate(tree_leaves(output)):
            if isinstance(leaf, Tensor) and id(leaf) not in given:
                self.put(leaf, _hashed(done, place))
        for argument, value in _with_schema(func, args, named):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for leaf in tree_leaves(value):
                    if isinstance(leaf, Tensor):
                        place_of = _storage(leaf)
                        self._written[place_of] = _hashed(self._written.get(place_of), done, self.hash_of(leaf))
        return output

    def _said(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.hash_of(value), tuple(value.shape)
        if isinstance(value, list | tuple):
            return tuple(map(self._said, value))
        if isinstance(value, dict):
            return tuple((key, self._said(each)) for key, each in sorted(value.items()))
        return repr(value)

    @contextmanager
    def naming(self, skeleton: Any, numbers: Sequence[int]) -> Iterator[None]:
        """Name the weights, those of experts too, which `experts_forward` does not multiply by on the meta device."""
        handles: list[Any] = []
        with self._buffers_on_meta(skeleton.layers):
            named = {id(tensor): name for name, tensor in _weights(skeleton.model)}
            for name, tensor in _weights(skeleton.model):
                self.put(tensor, original_name(name, skeleton.layers_path, numbers), "")
            for place, layer in enumerate(skeleton.layers):
                inside = f"{skeleton.layers_path}.{place}."
                for name, tensor in _weights(layer):
                    if named[id(tensor)].startswith(inside):  # not one that the layer shares with another part of the model
                        self.put(tensor, f"layer's {name}", "")
                experts = [module for module in layer.modules() if expert_parameters(module)]
                handles += [module.register_forward_hook(self._experts, with_kwargs=True) for module in experts]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    @contextmanager
    def _buffers_on_meta(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """While the context is open, the layers' buffers are on the meta device, as parameters are; their values are noted."""
        modules = [module for layer in layers for module in layer.modules()]
        held = [(module, name, buffer) for module in modules for name, buffer in module._buffers.items() if buffer is not None]
        moved = {id(buffer): buffer.to(_META) for _, _, buffer in held}
        for module, name, buffer in held:
            self.put(moved[id(buffer)], self.hash_of(buffer), "")
            module._buffers[name] = moved[id(buffer)]
        try:
            yield
        finally:
            for module, name, buffer in held:
                module._buffers[name] = buffer

    def _experts(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        weights = [self.hash_of(weight) for _, weight in _weights(module)]
        done = _hashed(type(module).__qualname__, weights, self._said(args), self._said(kwargs))
        for place, leaf in enumerate(tree_leaves(output)):
            if isinstance(leaf, Tensor):
                self.put(leaf, _hashed(done, place))


def original_name(name: str, layers_path: str, numbers: Sequence[int]) -> str:
    """The name in the original model of a parameter of the shallower one.

    Args:
        numbers: the original model's number of each layer.
    """
    if not name.startswith(layers_path + "."):
        return name
    place, _, rest = name.removeprefix(layers_path + ".").partition(".")
    return f"{layers_path}.{numbers[int(place)]}.{rest}"


def _weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    for path, child in module.named_modules():
        for name in sorted(_stored(child)):
            buffer = child._buffers[name]
            if buffer is not None:
                yield f"{path}.{name}" if path else name, buffer


def _noted(recorder: _Recorder, layer: nn.Module, number: int, dropped: bool, kinds: dict[int, str]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        """Run the layer, or skip it, and note what its output is."""
        call = Call(args, kwargs)
        same, state = call.hidden, recorder.hash_of(call.hidden)
        recorder.call = _hashed("layer", number, state, kinds.get(number))

        def after(place: int, leaf: Tensor) -> str:
            return (
                state if leaf is same else _hashed("dropped" if dropped else "", number, place, state, recorder.hash_of(leaf))
            )

        try:
            if dropped:
                return _real(passed_by(layer, call), recorder, after)
            moved = call.to(_META)
            recorder.put(moved.hidden, "hidden")
            output = run_layer(layer, moved)
            said = _hashed([recorder.hash_of(leaf) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)])
            kinds[number] = _hashed(kinds[number], said) if number in kinds else said
            return _real(output, recorder, after)
        finally:
            recorder.call = ""

    return forward


def _real(output: Any, recorder: _Recorder, named: Callable[[int, Tensor], str]) -> Any:
    """A layer's output as zeros on the CPU, where the model's other parts are, with hashes of their own."""
    leaves, spec = tree_flatten(output)
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            value = named(place, leaf)
            leaves[place] = torch.zeros(leaf.shape, dtype=leaf.dtype)
            recorder.put(leaves[place], value, "")
    return tree_unflatten(leaves, spec)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _with_schema(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    for place, argument in enumerate(func._schema.arguments):
        if place < len(args):
            yield argument, args[place]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


@contextmanager
def _plain_attention(model: Any) -> Iterator[None]:
    """While the context is open, attention runs by its plain formula."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    before = {key: copy.copy(getattr(config, "_attn_implementation_internal", None)) for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation_internal = _ATTENTION
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
