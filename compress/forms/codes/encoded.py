"""The encoded form: a matrix in a trellis or lattice code, rotated on both sides, with one scale for 16 columns.

The rotated matrix is cut into tiles of 16 x 16 (code.py); rows and columns are filled up to whole tiles. A weight costs its
bits and, for the scales, 1/out of a number of the checkpoint's dtype for 16 of them: 2.002 bits at out = 576. Where outputs
have gains, a number each, that is 1/in of a number more. Signs of the rotation come from a seed in the spec. Codes are packed
in memory as on disk; a product reads back some rows of tiles at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..base import MODULES, SPECS, Form, FormSpec, Spec
from ..kernels import trellis, trellis_matrix
from .code import SIDE, Code, Kind, from_tiles
from .few_rows import can_multiply, product_of_few
from .reading import can_read, read_trellis, why_not_compiled
from .rotation import rotate, rotate_back, rotate_both_back

_AT_ONCE = 1 << 21  # values that a product reads back at a time


@dataclass(frozen=True)
class Encoded(Form):
    """A matrix in a code.

    Args:
        code: of the tiles.
        codes: (rows of tiles, columns of tiles, bytes of a tile) uint8.
        scales: (columns of tiles,) floating point; what the code's values are multiplied by.
        shape: (out, in) of the matrix.
        seed: of the rotations' signs; None: the matrix is not rotated.
        gains: (out,) floating point, what the outputs are multiplied by after their rotation is undone; None: by nothing.
        bias: (out,) or None.
        dtype: in which `dense` returns the matrix.
    """

    kind: ClassVar[str] = "encoded"
    code: Code
    codes: Tensor
    scales: Tensor
    shape: tuple[int, int]
    seed: int | None
    gains: Tensor | None = None
    bias: Tensor | None = None
    dtype: torch.dtype = torch.float64

    def tensors(self) -> dict[str, Tensor]:
        named = {"weight": self.codes.flatten(), "scales": self.scales, "gains": self.gains, "bias": self.bias}
        return {name: tensor.contiguous() for name, tensor in named.items() if tensor is not None}

    def dense(self) -> Tensor:
        matrix = _matrix(self.code, self.codes, torch.float32).double()
        matrix = (matrix * _by_column(self.scales.double()))[: self.shape[0], : self.shape[1]]
        matrix = matrix if self.seed is None else rotate_both_back(matrix, self.seed)
        return (matrix if self.gains is None else matrix * self.gains.double()[:, None]).to(self.dtype)

    def spec(self) -> Spec:
        has = {"gains": self.gains is not None, "bias": self.bias is not None}
        return {"kind": self.kind, "code": self.code.spec(), "seed": self.seed, **has}

    def with_bias(self, bias: Tensor | None) -> Encoded:
        if bias is None:
            return self
        return replace(self, bias=bias.to(self.dtype) if self.bias is None else self.bias + bias.to(self.bias))

    def stored(self, dtype: torch.dtype) -> Encoded:
        """The same form on the CPU for a checkpoint in `dtype`, which represents the scales exactly where it has their range.

        A scale below the normal range of float16 is rounded to the smallest one in it.
        """
        gains, bias = (None if each is None else each.to("cpu", dtype) for each in (self.gains, self.bias))
        scales = self.scales.cpu()
        rounded = torch.where(scales > 0, scales.to(dtype).clamp_min(torch.finfo(dtype).smallest_normal), 0).to(dtype)
        return Encoded(self.code, self.codes.cpu(), rounded, self.shape, self.seed, gains, bias, dtype)


class EncodedLinear(nn.Module):
    """`y = gains · Q_outᵀ (codes · (Q_in x)) + bias`; the rotated matrix is read back some rows at a time.

    Args:
        spec: of the form.
        in_features, out_features: of the matrix.
        dtype: of scales, gains and bias; the product is done in the dtype of the input, the rotations in float32 or better.
    """

    def __init__(self, spec: Spec, in_features: int, out_features: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.code, self.seed = Code(**{"version": 1} | spec["code"]), spec["seed"]  # the first version did not name itself
        self.in_features, self.out_features = in_features, out_features
        self._tiles = -(-out_features // SIDE), -(-in_features // SIDE)
        # a parameter, because loaders place parameters on devices and in shards; they do not cast uint8
        count = self._tiles[0] * self._tiles[1] * self.code.nbytes
        self.weight = nn.Parameter(torch.empty(count, dtype=torch.uint8), requires_grad=False)
        self.scales = nn.Parameter(torch.empty(self._tiles[1], dtype=dtype))
        self.gains = nn.Parameter(torch.empty(out_features, dtype=dtype)) if spec.get("gains") else None
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype)) if spec["bias"] else None

    def forward(self, x: Tensor) -> Tensor:
        """`y` (..., out) of an input (..., in), in its dtype; scales multiply the input, which costs less than the weight."""
        rows, shape = x.numel() // self.in_features, (self.out_features, self.in_features)
        if can_multiply(self.code, self.weight, x, shape, self.seed is not None):
            return self._few_rows(x)
        if self.seed is not None and rows * (self.in_features + self.out_features) > 2 * self.in_features * self.out_features:
            # to rotate the matrix back is cheaper than to rotate so many inputs and outputs, and takes less memory than they
            whole = EncodedLinear.matrix(self, x.dtype)  # self.matrix may have a correction in it
            return nn.functional.linear(x, whole, None if self.bias is None else self.bias.to(x.dtype))
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x.view(*x.shape[:-1], self.in_features)  # for torch.compile, to which this size is unknown
        inner = x.to(wide) if self.seed is None else rotate(x.to(wide), self.seed)
        inner = inner * _by_column(self.scales.to(wide))[: self.in_features]
        inner = nn.functional.pad(inner, (0, self._tiles[1] * SIDE - self.in_features)).to(x.dtype)
        y = self._times_codes(inner)[..., : self.out_features]
        if self.seed is not None:
            y = rotate_back(y.to(wide), self.seed + 1).to(x.dtype)
        if self.gains is not None:
            y = y * self.gains.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def _times_codes(self, inner: Tensor) -> Tensor:
        """The product (..., rows of whole tiles) of the codes with an input (..., columns of such), rotated and scaled."""
        codes = self._codes()
        if (y := trellis(self.code, codes, inner)) is not None:
            return y
        step = max(1, _AT_ONCE // (self._tiles[1] * SIDE * SIDE))
        return torch.cat([nn.functional.linear(inner, _matrix(self.code, rows, inner.dtype)) for rows in codes.split(step)], -1)

    def _few_rows(self, x: Tensor) -> Tensor:
        """The product by compiled code; everything in float32."""
        flat = x.detach().reshape(-1, self.in_features)
        y = product_of_few(self.code, self._codes(), flat, self.scales, self.seed, self.out_features)
        if self.gains is not None:
            y = y * self.gains.float()
        if self.bias is not None:
            y = y + self.bias.float()
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The (out, in) matrix that this module multiplies by, in `dtype`; computed in float32 or better."""
        wide = torch.promote_types(dtype, torch.float32)
        matrix = _matrix(self.code, self._codes(), torch.float32).to(wide) * _by_column(self.scales.to(wide))
        matrix = matrix[: self.out_features, : self.in_features]
        matrix = matrix if self.seed is None else rotate_both_back(matrix, self.seed)
        return (matrix if self.gains is None else matrix * self.gains.to(wide)[:, None]).to(dtype)

    def why_slow(self) -> str:
        """Why few rows are not multiplied by compiled code or by a kernel; empty where they are."""
        return why_not_compiled(self.code, self.weight)

    def _codes(self) -> Tensor:
        return self.weight.view(*self._tiles, self.code.nbytes)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.code}, bias={self.bias is not None}"


def _matrix(code: Code, codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix of codes (rows of tiles, columns of tiles, bytes) without scales, in whole tiles."""
    if can_read(code, codes):
        return read_trellis(code, codes).to(dtype)
    if (found := trellis_matrix(code, codes, dtype)) is not None:
        return found
    return from_tiles(code.values(codes.flatten(0, 1)).view(*codes.shape[:2], -1)).to(dtype)


def _by_column(scales: Tensor) -> Tensor:
    return scales.repeat_interleave(SIDE)


class CodeSpec(BaseModel):
    """Spec of a code; `Code` itself checks that its numbers fit together."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    kind: Kind
    bits: int
    state_bits: int
    version: int = 1


class EncodedSpec(FormSpec):
    """Spec of a matrix in a code."""

    code: CodeSpec
    seed: int | None = Field(ge=0, lt=1 << 31)
    gains: bool = False
    bias: bool


SPECS[Encoded.kind] = EncodedSpec
MODULES[Encoded.kind] = EncodedLinear
