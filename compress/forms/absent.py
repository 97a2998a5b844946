"""Two forms that compress nothing: a matrix that was dropped, and a dense matrix that a reader without lrc must not load.

`zero` replaces a target of a dropped sub-layer: its output is zero, and an empty tensor, the guard, is stored under the
target's name. `guarded` is a dense matrix that is stored under another name, with an empty guard under its own. A layer that
must not run without a module of lrc (stream_map.py) has one guarded matrix, so that a reader without lrc fails on its shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from .base import MODULES, SPECS, Dense, DenseSpec, FormSpec

ZERO = "zero"


class ZeroLinear(nn.Module):
    """`y = 0` with `out_features` features; `weight` is empty."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The (out, in) matrix that this module multiplies by, in `dtype`."""
        return self.weight.new_zeros(self.out_features, self.in_features, dtype=dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


@dataclass(frozen=True)
class Guarded(Dense):
    """A dense weight that is stored under another name."""

    kind: ClassVar[str] = "guarded"

    def tensors(self) -> dict[str, Tensor]:
        named = super().tensors()
        return {"weight": self.weight.new_empty(0), "dense": named.pop("weight")} | named


class GuardedLinear(nn.Module):
    """`y = dense x + bias`; `weight` is empty."""

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype))
        self.dense = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dense, self.bias)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The (out, in) matrix that this module multiplies by, in `dtype`."""
        return self.dense.to(dtype)


SPECS[ZERO], SPECS[Guarded.kind] = FormSpec, DenseSpec
MODULES[ZERO] = lambda spec, n, m, dtype: ZeroLinear(n, m, dtype)
MODULES[Guarded.kind] = lambda spec, n, m, dtype: GuardedLinear(n, m, spec["bias"], dtype)
