"""Quantized forms: codes on a grid, alone or with a low-rank correction beside them.

Codes are packed into a flat tensor. Otherwise an 8-bit matrix would have the shape of the dense one, and a reader without lrc
would take codes for weights. Quantized factors are a `Product` (product.py) of two quantized forms.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from .base import MODULES, SPECS, Form, FormSpec, LowRank, Spec, build_module
from .grids import Grid, Scales, exponents_of, pack, packed_width, powers, unpack
from .product import Product


@dataclass(frozen=True)
class Quantized(Form):
    """A matrix on a grid.

    Args:
        grid: of the codes.
        codes: (out, in) uint8.
        scales: of the groups; on an `mxint` grid in float32 or float64, whatever the checkpoint's dtype is.
        bias: (out,) or None.
        dtype: in which `dense` computes.
    """

    kind: ClassVar[str] = "quantized"
    grid: Grid
    codes: Tensor
    scales: Scales
    bias: Tensor | None = None
    dtype: torch.dtype = torch.float64

    @classmethod
    def nearest(cls, weight: Tensor, grid: Grid) -> Quantized:
        """The matrix (out, in) with each value rounded to the nearest point of the grid; computed in float64."""
        scales = grid.scales(weight)
        return cls(grid, grid.encode(weight, scales), scales)

    def tensors(self) -> dict[str, Tensor]:
        named = {"weight": pack(self.codes, self.grid.bits).flatten()}
        if self.grid.kind == "mxint":
            named["exponents"] = exponents_of(self.scales.steps)
        else:
            named["scales"] = self.scales.steps.contiguous()
        if self.scales.zeros is not None:
            named["zeros"] = pack(self.scales.zeros, self.grid.bits).flatten()
        return named if self.bias is None else named | {"bias": self.bias.contiguous()}

    def dense(self) -> Tensor:
        return self.grid.decode(self.codes, self.scales, self.dtype)

    def spec(self) -> Spec:
        return {"kind": self.kind, "grid": self.grid.spec(), "bias": self.bias is not None}

    def with_bias(self, bias: Tensor | None) -> Quantized:
        if bias is None:
            return self
        return replace(self, bias=bias.to(self.dtype) if self.bias is None else self.bias + bias.to(self.bias))

    def stored(self, dtype: torch.dtype) -> Quantized:
        """The same form on the CPU for a checkpoint in `dtype`, which represents the steps exactly.

        A step below the normal range of float16 is rounded, and its codes are chosen again for the rounded step.
        """
        bias = None if self.bias is None else self.bias.to("cpu", dtype)
        codes, zeros = self.codes.cpu(), None if self.scales.zeros is None else self.scales.zeros.cpu()
        steps = self.scales.steps.cpu()
        if self.grid.kind == "mxint":
            return Quantized(self.grid, codes, Scales(steps.float(), zeros), bias, dtype)
        rounded = steps.to(dtype)
        if not torch.equal(rounded.double(), steps.double()):
            rounded = torch.where(rounded > 0, rounded, torch.finfo(dtype).smallest_normal)
            values = self.grid.decode(codes, Scales(steps.double(), zeros), torch.float64)
            codes = self.grid.encode(values, Scales(rounded.double(), zeros))
        return Quantized(self.grid, codes, Scales(rounded, zeros), bias, dtype)


@dataclass(frozen=True)
class QuantizedLowRank(Form):
    """`weight ≈ base + correction`: a quantized matrix and a low-rank form of its error.

    Args:
        base: the quantized matrix; has the bias.
        correction: factors in the checkpoint's dtype, or quantized themselves.
    """

    kind: ClassVar[str] = "quantized+low-rank"
    base: Quantized
    correction: LowRank | Product

    def tensors(self) -> dict[str, Tensor]:
        return self.base.tensors() | {f"correction.{name}": tensor for name, tensor in self.correction.tensors().items()}

    def dense(self) -> Tensor:
        return self.base.dense() + self.correction.dense()

    def spec(self) -> Spec:
        return self.base.spec() | {"kind": self.kind, "correction": self.correction.spec()}

    def with_bias(self, bias: Tensor | None) -> QuantizedLowRank:
        return QuantizedLowRank(self.base.with_bias(bias), self.correction)

    def stored(self, dtype: torch.dtype) -> QuantizedLowRank:
        return QuantizedLowRank(self.base.stored(dtype), self.correction.stored(dtype))


class QuantizedLinear(nn.Module):
    """`y = weight x + bias`, the weight unpacked from its codes at each call.

    Args:
        grid: of the codes.
        in_features, out_features: of the matrix.
        bias: whether there is one.
        dtype: of scales and bias; the multiplication is done in the dtype of the input.
    """

    def __init__(self, grid: Grid, in_features: int, out_features: int, bias: bool, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.grid, self.in_features, self.out_features = grid, in_features, out_features
        groups = grid.groups(in_features)
        self.weight = _bytes(out_features * packed_width(in_features, grid.bits))
        if grid.kind == "mxint":
            self.exponents = _bytes(out_features, groups)
        else:
            self.scales = nn.Parameter(torch.empty(out_features, groups, dtype=dtype))
        if not grid.symmetric:
            self.zeros = _bytes(out_features * packed_width(groups, grid.bits))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self._on_grid(x.dtype), self.bias)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The (out, in) matrix that this module multiplies by, in `dtype` (None: that of its scales, float32 on `mxint`)."""
        return self._on_grid(dtype)

    def _on_grid(self, dtype: torch.dtype | None) -> Tensor:
        grid = self.grid
        steps = powers(self.exponents) if grid.kind == "mxint" else self.scales
        zeros = None if grid.symmetric else self._unpacked(self.zeros, grid.groups(self.in_features))
        return grid.decode(self._unpacked(self.weight, self.in_features), Scales(steps, zeros), dtype or steps.dtype)

    def _unpacked(self, packed: Tensor, count: int) -> Tensor:
        return unpack(packed.view(self.out_features, -1), self.grid.bits, count)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.grid}, bias={self.bias is not None}"


def _bytes(*shape: int) -> nn.Parameter:
    # a parameter, because loaders place parameters on devices and in shards; they do not cast uint8
    return nn.Parameter(torch.empty(shape, dtype=torch.uint8), requires_grad=False)


class QuantizedLowRankLinear(QuantizedLinear):
    """`y = weight x + correction(x) + bias`."""

    def __init__(self, spec: Spec, in_features: int, out_features: int, dtype: torch.dtype | None = None) -> None:
        super().__init__(Grid(**spec["grid"]), in_features, out_features, spec["bias"], dtype)
        self.correction = build_module(spec["correction"], in_features, out_features, dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x) + self.correction(x)
        return y

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The (out, in) matrix that this module multiplies by."""
        base = self._on_grid(dtype)
        return base + _dense(self.correction).to(base.dtype)


def _dense(module: Any) -> Tensor:
    """The matrix of a low-rank module; its factors may be modules themselves."""
    if hasattr(module, "right"):
        return module.left.dense() @ module.right.dense()
    matrix: Tensor = module.dense()
    return matrix


def _quantized(spec: Spec, in_features: int, out_features: int, dtype: torch.dtype | None) -> nn.Module:
    return QuantizedLinear(Grid(**spec["grid"]), in_features, out_features, spec["bias"], dtype)


class GridSpec(BaseModel):
    """Spec of a grid; `Grid` itself checks the number of bits."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    bits: int
    group_size: int = Field(ge=0, lt=1 << 31)
    kind: Literal["int", "mxint"]
    symmetric: bool


class QuantizedSpec(FormSpec):
    """Spec of codes on a grid."""

    grid: GridSpec
    bias: bool


class QuantizedLowRankSpec(QuantizedSpec):
    """Spec of codes on a grid and their correction, which is checked when its module is built."""

    correction: Spec


SPECS[Quantized.kind], SPECS[QuantizedLowRank.kind] = QuantizedSpec, QuantizedLowRankSpec
MODULES[Quantized.kind] = _quantized
MODULES[QuantizedLowRank.kind] = QuantizedLowRankLinear
