"""Edits of a layer: new values of its tensors, targets that multiply to zero, linear maps around its modules.

Dropping sub-layers and repairs after layers were dropped (depth/) produce edits. An edit is data: it is kept on disk beside an
unfinished artifact, applied to a layer after its weights were loaded, and undone before they are unloaded. Code that runs or
stores the layer in between sees the edited layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..compress.forms import experts
from ..compress.forms import stream_map as mapped
from ..compress.forms.absent import ZERO, ZeroLinear
from ..compress.forms.base import Spec, fill_module
from .targets import Target


@dataclass(frozen=True)
class LinearMap:
    """`h + D h + b` on the input of a module, or on its output.

    Args:
        weight: D, (width, width).
        bias: (width,) or None.
        side: 'input' or 'output'.
    """

    weight: Tensor
    bias: Tensor | None
    side: str

    @property
    def spec(self) -> Spec:
        return mapped.spec(len(self.weight), self.side, self.bias is not None)

    @property
    def numel(self) -> int:
        return self.weight.numel() + (0 if self.bias is None else self.bias.numel())


@dataclass(frozen=True, eq=False)
class LayerEdit:
    """What is changed in one layer; two edits are equal only if they are one object.

    Args:
        zeroed: targets that multiply to zero.
        tensors: parameter, by its path in the layer -> its new value.
        maps: module, by its path in the layer ('' is the layer itself) -> the map around it.
    """

    zeroed: tuple[Target, ...] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    maps: Mapping[str, LinearMap] = field(default_factory=dict)

    def with_others(self, other: LayerEdit) -> LayerEdit:
        """Both edits; the other's values where both change a tensor."""
        return LayerEdit(self.zeroed + other.zeroed, {**self.tensors, **other.tensors}, {**self.maps, **other.maps})

    def specs(self, layer: str) -> dict[str, Spec]:
        """Module path -> spec, as config.json carries it."""
        found: dict[str, Spec] = {}
        for target in self.zeroed:
            if target.expert is None:
                found[target.name] = {"kind": ZERO}
            else:
                entry = found.setdefault(target.name.rpartition(".")[0], {"kind": "experts", "forms": []})
                entry["forms"].append({"kind": ZERO})
        return found | {f"{layer}.{path}" if path else layer: each.spec for path, each in self.maps.items()}


NONE = LayerEdit()


@contextmanager
def edited(layer: nn.Module, name: str, edit: LayerEdit | None) -> Iterator[nn.Module]:
    """While the context is open, the edit is applied to the layer.

    Args:
        layer: with its weights in memory.
        name: its module path.
    """
    undo: list[Callable[[], object]] = []
    try:
        for path, value in (edit.tensors if edit else {}).items():
            undo.append(_put(layer, path, value))
        # `_zero` of the first expert zeroes all experts of its parameter
        zeroed = [target for target in edit.zeroed if target.expert is None or target.expert == 0] if edit else []
        undo.extend(_zero(layer, name, target) for target in zeroed)
        for path, each in (edit.maps if edit else {}).items():
            module = layer.get_submodule(path)
            inside = next(module.parameters())
            mapping = mapped.install(module, each.spec)
            tensors = {"weight": each.weight} | ({} if each.bias is None else {"bias": each.bias})
            fill_module(mapping, {key: value.to(inside.device, inside.dtype) for key, value in tensors.items()})
            undo.append(partial(mapped.remove, module))
        yield layer
    finally:
        for put_back in reversed(undo):
            put_back()


def _put(layer: nn.Module, path: str, value: Tensor) -> Callable[[], object]:
    """Replace a parameter's value; returns the function that undoes it."""
    parent, _, leaf = path.rpartition(".")
    module = layer.get_submodule(parent)
    old: Any = getattr(module, leaf)
    setattr(module, leaf, nn.Parameter(value.to(old.device, old.dtype), requires_grad=False))
    return partial(setattr, module, leaf, old)


def _zero(layer: nn.Module, name: str, target: Target) -> Callable[[], object]:
    """Zero a target, or all experts of an expert's parameter; returns the function that undoes it."""
    path = target.module.removeprefix(name + ".")
    if target.expert is not None:
        module, leaf = layer.get_submodule(path), target.role.rpartition(".")[2]
        old: Any = getattr(module, leaf)
        empty = [ZeroLinear(target.in_features, target.out_features, old.dtype).to(old.device) for _ in range(len(old))]
        experts.install(module, leaf, list(empty))

        def restore() -> None:
            delattr(module, experts.stored_name(leaf, 0).rpartition(".")[0])
            setattr(module, leaf, old)

        return restore
    parent, _, leaf = path.rpartition(".")
    holder = layer.get_submodule(parent)
    dense: Any = getattr(holder, leaf)
    gone = ZeroLinear(target.in_features, target.out_features, dense.weight.dtype).to(dense.weight.device)
    setattr(holder, leaf, gone)
    return partial(setattr, holder, leaf, dense)
