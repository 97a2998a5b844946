"""A module whose hidden state is mapped to h + D h + b, at its input or at its output.

A decoder has no weight that multiplies its hidden state. A repair that needs one (depth/repairs/linear_patch.py) is therefore
wrapped around an existing module: the module's class is replaced by a subclass whose forward pass maps the first floating-point
tensor of its arguments, or of its result. The module's own tensors keep their names; those of the map are
`<module>.stream_map.weight` (D) and `.bias`. D is stored instead of 1 + D, because 16 bits represent a small difference from
the identity more precisely.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .base import Count, FormSpec, Spec

KIND = "map"
NAME = "stream_map"


class MapSpec(FormSpec):
    """Spec of a map."""

    width: Count
    side: Literal["input", "output"]
    bias: bool


class StreamMap(nn.Module):
    """`h + D h + b` on the last axis; weight D is (width, width)."""

    def __init__(self, width: int, bias: bool, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(width, dtype=dtype)) if bias else None

    def forward(self, h: Tensor) -> Tensor:
        return h + nn.functional.linear(h, self.weight, self.bias)


def spec(width: int, side: str, bias: bool) -> Spec:
    """What a loader must know about a map; `side` is 'input' or 'output'."""
    return {"kind": KIND, "width": width, "side": side, "bias": bias}


def install(module: nn.Module, spec: Spec, dtype: torch.dtype | None = None) -> StreamMap:
    """Wrap an empty map around a module and return the map; `remove` undoes this."""
    MapSpec.model_validate(spec)
    mapped = StreamMap(spec["width"], spec["bias"], dtype)
    module.add_module(NAME, mapped)
    module.__class__ = _mapping(type(module), spec["side"])
    return mapped


def remove(module: nn.Module) -> None:
    """Remove the map of a module."""
    module.__class__ = type(module).__mro__[1]
    delattr(module, NAME)


def _mapping(plain: type, side: str) -> type:
    """A subclass of the module's class with the same name, which transformers checks when it places layers on devices."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if side == "input":
            args, kwargs = _mapped(getattr(self, NAME), (args, kwargs))
            return plain.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        return _mapped(getattr(self, NAME), plain.forward(self, *args, **kwargs))  # type: ignore[attr-defined]

    return type(plain.__name__, (plain,), {"forward": forward, "__module__": plain.__module__})


def _mapped(mapping: StreamMap, value: Any) -> Any:
    leaves, structure = tree_flatten(value)
    place = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    leaves[place] = mapping(leaves[place])
    return tree_unflatten(leaves, structure)
