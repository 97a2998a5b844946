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

from .base import MODULES, SPECS, Form, FormSpec, Spec, build_module, matrix_of
from .cpu.int4 import AT_ONCE, DTYPES, Packed, available, kernel_group, multiply, pack_codes, unpack_codes
from .grids import Grid, Scales, exponents_of, pack, packed_width, powers, unpack
from .kernels import coded, why_not_coded
from .product import Corrected


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


class QuantizedLowRank(Corrected[Quantized]):
    """A quantized matrix with a correction."""

    kind: ClassVar[str] = "quantized+low-rank"


class QuantizedLinear(nn.Module):
    """`y = weight x + bias`, the weight unpacked from its codes at each call, or multiplied by a kernel that reads codes.

    After `pack`, codes and scales are in memory in the kernel's layout alone (cpu/int4.py); `weight` and `scales` are empty.
    Whatever needs them in their own order brings them back: saving, loading, moving to another device or dtype, and training.

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
        self._made_for = dtype or torch.get_default_dtype()  # of the inputs, where no scales say it
        if grid.kind == "mxint":
            self.exponents = _bytes(out_features, groups)
        else:
            self.scales = nn.Parameter(torch.empty(out_features, groups, dtype=dtype))
        if not grid.symmetric:
            self.zeros = _bytes(out_features * packed_width(groups, grid.bits))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        packed = self._packed
        if packed is None and (y := coded(self, x)) is not None:
            return y
        if packed is None:
            return self._multiply_decoded(x)
        if x.dtype != packed.scales.dtype or (x.requires_grad and torch.is_grad_enabled()):  # the kernel has no gradient
            return nn.functional.linear(x, self._on_grid(x.dtype), self.bias)
        return multiply(x, packed, self.bias)

    def _multiply_decoded(self, x: Tensor) -> Tensor:
        """Decode the matrix and multiply; without gradients some rows at a time, so that they stay in the cache."""
        at_once = max(1, AT_ONCE // self.in_features)
        if at_once >= self.out_features or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return nn.functional.linear(x, self._on_grid(x.dtype), self.bias)
        codes, scales = self.weight.view(self.out_features, -1), self._scales()
        parts = []
        for rows in (slice(first, first + at_once) for first in range(0, self.out_features, at_once)):
            own = Scales(scales.steps[rows], None if scales.zeros is None else scales.zeros[rows])
            block = self.grid.decode(unpack(codes[rows], self.grid.bits, self.in_features), own, x.dtype)
            parts.append(nn.functional.linear(x, block, None if self.bias is None else self.bias[rows]))
        return torch.cat(parts, dim=-1)

    @property
    def _packed(self) -> Packed | None:
        codes, scales = self._buffers.get("packed_codes"), self._buffers.get("packed_scales")
        if codes is None or scales is None:
            return None
        group = kernel_group(self.grid, self.in_features)
        assert group is not None
        return Packed(codes, scales, self.out_features, group, self.grid.middle)

    @property
    def _dtype(self) -> torch.dtype:
        """The dtype of inputs that a kernel can multiply."""
        return self._made_for if self.grid.kind == "mxint" else self.scales.dtype

    def why_unpacked(self) -> str:
        """Why no kernel multiplies by these codes; empty where one does, or where `pack` would make one do so."""
        if self._packed is not None:
            return ""
        if self.weight.device.type != "cpu":
            return why_not_coded(self)
        if self._dtype not in DTYPES:
            return f"torch's kernel for codes is slow in {str(self._dtype).removeprefix('torch.')}; load with bfloat16"
        if kernel_group(self.grid, self.in_features) is None:
            return f"torch has no kernel for groups of {self.grid.width(self.in_features)} of {self.in_features} inputs"
        return "" if available() else "torch has no kernel for codes on this processor"

    def pack(self) -> bool:
        """Keep the codes in the layout of the CPU's kernel from now on; False where there is no kernel for them."""
        if self._packed is not None or self.weight.device.type != "cpu" or self.why_unpacked() or not self.weight.numel():
            return self._packed is not None
        packed = pack_codes(self.grid, *self.unpacked(), self._dtype)
        self.register_buffer("packed_codes", packed.codes, persistent=False)
        self.register_buffer("packed_scales", packed.scales, persistent=False)
        for parameter in [self.weight] if self.grid.kind == "mxint" else [self.weight, self.scales]:
            parameter.data = parameter.data.new_empty(0)  # the same parameter: an optimizer may have it already
        return True

    def unpack(self) -> None:
        """Bring the codes back into their own order; nothing happens where they are in it."""
        if (packed := self._packed) is None:
            return
        for name, tensor in self._in_order(packed).items():
            self.get_parameter(name).data = tensor
        del self.packed_codes, self.packed_scales

    def _in_order(self, packed: Packed) -> dict[str, Tensor]:
        """The tensors that `pack` emptied, as they were."""
        named = {"weight": pack(unpack_codes(packed), self.grid.bits).flatten()}
        return named if self.grid.kind == "mxint" else named | {"scales": packed.steps(self.grid.groups(self.in_features))}

    def train(self, mode: bool = True) -> QuantizedLinear:
        """As for every module; a kernel cannot be trained through, so training brings the codes back."""
        if mode:
            self.unpack()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        self.unpack()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if (packed := self._packed) is not None:
            destination.update({prefix + name: tensor for name, tensor in self._in_order(packed).items()})

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The (out, in) matrix that this module multiplies by, in `dtype`."""
        return self._on_grid(dtype)

    def unpacked(self) -> tuple[Tensor, Scales]:
        """The codes (out, in) uint8, and the scales of their groups."""
        packed = self._packed
        codes = self._unpacked(self.weight, self.in_features) if packed is None else unpack_codes(packed)
        return codes, self._scales()

    def _scales(self) -> Scales:
        grid, packed = self.grid, self._packed
        if grid.kind == "mxint":
            return Scales(powers(self.exponents))
        zeros = None if grid.symmetric else self._unpacked(self.zeros, grid.groups(self.in_features))
        return Scales(self.scales if packed is None else packed.steps(self.grid.groups(self.in_features)), zeros)

    def _on_grid(self, dtype: torch.dtype) -> Tensor:
        return self.grid.decode(*self.unpacked(), dtype)

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
        if self._packed is None and (y := coded(self, x, self.correction)) is not None:
            return y
        total: Tensor = super().forward(x) + self.correction(x)
        return total

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The (out, in) matrix that this module multiplies by, in `dtype`."""
        return self._on_grid(dtype) + matrix_of(self.correction, dtype)


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
