"""One product for the right factors of modules that read the same input (q, k and v; gate and up).

For one row of input a product of a small matrix takes longer to start than to compute. `stack_siblings` therefore prepares a
loaded model: while it answers its first tokens without gradients, the low-rank modules beside each other note which of them are
called with the same tensor, one after the other. Their right factors are then put into one tensor, of which each module's own
`weight` becomes a view, and the first module called multiplies by all of them.

Nothing else changes. Parameters keep their names, shapes and values, so saving, loading into them, and dense copies work as
before. Each product is compared with what it was made for: another input is multiplied by the module's own factor, and where a
factor is no longer the view (another device or dtype, another parameter) the stack is given up. Gradients, compiled code and
inputs of many rows take the module's own factor too.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from .base import LowRankLinear

# rows of input up to which one product is faster than several (576 x 172 to 4096 x 1791, bfloat16, one thread)
FEW = 8


def stack_siblings(model: nn.Module) -> None:
    """Prepare the low-rank modules of a loaded model; those on another device than the CPU are left as they are."""
    for parent in model.modules():
        alike: dict[int, list[LowRankLinear]] = defaultdict(list)
        for child in parent.children():
            module = getattr(child, "correction", child)  # the correction of codes has the same input as the codes
            if isinstance(module, LowRankLinear) and module.weight.device.type == "cpu":
                alike[module.in_features].append(module)
        for members in alike.values():
            if len(members) > 1:
                together = Together()
                for module in members:
                    module.together = together


class Together:
    """Modules beside each other, and which of them have had the same input."""

    def __init__(self) -> None:
        self._runs: list[list[LowRankLinear]] = []
        self._last: Any = None  # weak: an input is not kept for this

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy of a module multiplies by its own factor

    def product(self, module: LowRankLinear, x: Tensor) -> Tensor:
        """`x` times the module's right factor; notes who else had this input."""
        if _alone(x):
            return nn.functional.linear(x, module.weight)
        if self._last is not None and self._last() is x and module not in self._runs[-1]:
            self._runs[-1].append(module)
        elif any(module in run for run in self._runs):  # the second pass begins
            for run in self._runs:
                _stack(run)
            return nn.functional.linear(x, module.weight) if module.together is None else module.together.product(module, x)
        else:
            self._runs.append([module])
        self._last = weakref.ref(x)
        return nn.functional.linear(x, module.weight)


class Stack:
    """The right factors of modules with the same input, in one tensor.

    Args:
        members: the modules, in the order in which they are called.
    """

    def __init__(self, members: list[LowRankLinear]) -> None:
        self._ranks = [len(module.weight) for module in members]
        self._right = torch.cat([module.weight.detach() for module in members])  # (ranks, in)
        self._members = members
        for module, part in zip(members, self._right.split(self._ranks), strict=True):
            module.weight.data = part
        self._places = [module.weight.data_ptr() for module in members]
        # the input, its version, and for each module its product until it is taken
        self._held: tuple[Tensor, int, dict[LowRankLinear, Tensor]] | None = None

    def __reduce__(self) -> Any:
        return type(None), ()

    def product(self, module: LowRankLinear, x: Tensor) -> Tensor:
        """`x` times the module's right factor, for all members at once where this is the first of them."""
        if _alone(x):
            return nn.functional.linear(x, module.weight)
        held = self._held
        if held is None or held[0] is not x or held[1] != x._version or module not in held[2]:
            if [member.weight.data_ptr() for member in self._members] != self._places:
                for member in self._members:
                    member.together = None
                return nn.functional.linear(x, module.weight)
            parts = nn.functional.linear(x, self._right).split(self._ranks, dim=-1)
            held = self._held = x, x._version, dict(zip(self._members, parts, strict=True))
        found = held[2].pop(module)
        if not held[2]:
            self._held = None
        return found


def _alone(x: Tensor) -> bool:
    """Whether a module multiplies this input by its own factor; an input of inference mode does not tell if it is changed."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.is_inference():
        return True
    return x.numel() > FEW * x.shape[-1] or x.device.type != "cpu"


def _stack(members: list[LowRankLinear]) -> None:
    """Stack these modules, where there are several and their factors are ordinary tensors on the CPU."""
    factors = [module.weight for module in members]
    ordinary = all(type(factor) is nn.Parameter and factor.device.type == "cpu" for factor in factors)
    whole = ordinary and len({factor.dtype for factor in factors}) == 1
    found = Stack(members) if len(members) > 1 and whole else None
    for module in members:
        module.together = found
