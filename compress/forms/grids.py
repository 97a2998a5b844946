"""Number grids: the values that a quantized number can have, how it is rounded to them, and how many bytes it takes.

A grid stores a matrix as codes of 2, 3, 4, 5, 6 or 8 bits, in groups along the input that share a step:

* `int`: value = (code - zero) · step. Symmetric: zero is the middle code, and the largest magnitude of a group is half a step
  beyond the last code, so that no error is larger than half a step. Asymmetric: zero is stored too, and the codes cover the
  group's range exactly (0 is always included).
* `mxint`: the step is a power of two, stored as one byte (OCP Microscaling Formats v1.0, with blocks of 16 or 32): with e the
  exponent of the block's largest magnitude, step = 2^(e - bits + 2); the middle code is 0.

Steps of `int` have eight significant bits from the start. bfloat16, float16 and float32 all represent them exactly, so codes
are chosen for exactly the steps that are stored.

Bits are packed least significant first, each row padded to whole bytes. Where a row fills whole 32-bit words this is the bit
order of the `pack-quantized` checkpoints of compressed-tensors (which pads rows to words and takes seconds to import).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import NonFiniteError

BITS = (2, 3, 4, 5, 6, 8)
_SHRUNK = tuple(1 - 0.05 * turn for turn in range(13))  # fractions of a group's range that `fitted` tries
_BIAS = 127  # added to a stored exponent, as in OCP's E8M0


@dataclass(frozen=True)
class Scales:
    """Steps and zeros of the groups of a matrix.

    Args:
        steps: (out, groups) floating point, all positive.
        zeros: (out, groups) uint8, the codes of the value 0; None where it is the middle code.
    """

    steps: Tensor
    zeros: Tensor | None = None


@dataclass(frozen=True)
class Grid:
    """A number grid.

    Args:
        bits: per code: 2, 3, 4, 5, 6 or 8.
        group_size: values along the input that share a step; 0: a whole row. The last group of a row may be shorter.
        kind: 'int' or 'mxint'.
        symmetric: whether zeros are not stored; `mxint` is always symmetric.
    """

    bits: int
    group_size: int = 64
    kind: Literal["int", "mxint"] = "int"
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"a grid has 2, 3, 4, 5, 6 or 8 bits, not {self.bits}")
        if self.group_size < 0:
            raise ValueError(f"a group has 1 value or more, or 0 for a whole row; not {self.group_size}")
        if self.kind == "mxint" and not self.symmetric:
            raise ValueError("an mxint grid is symmetric")

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The code of the value 0 where zeros are not stored."""
        return 2 ** (self.bits - 1)

    def width(self, in_features: int) -> int:
        """Values in a group of a row of `in_features`."""
        return min(self.group_size, in_features) or in_features

    def groups(self, in_features: int) -> int:
        """Groups in a row of `in_features`."""
        return -(-in_features // self.width(in_features))

    def nbytes(self, out_features: int, in_features: int, element: int) -> int:
        """Exact bytes of an (out, in) matrix on this grid; `element` is the bytes of a number in the checkpoint's own dtype."""
        groups = self.groups(in_features)
        codes = packed_width(in_features, self.bits)
        steps = groups * (1 if self.kind == "mxint" else element)
        zeros = 0 if self.symmetric else packed_width(groups, self.bits)
        return out_features * (codes + steps + zeros)

    def scales(self, weight: Tensor) -> Scales:
        """Steps (float64) and zeros for a matrix (out, in), from the range of each of its groups.

        Raises:
            NonFiniteError: a value is NaN or infinite.
        """
        if not torch.isfinite(weight).all():
            bad = int((~torch.isfinite(weight)).sum())
            raise NonFiniteError(f"{bad} of {weight.numel()} values to quantize are NaN or infinite.", "Check the statistics.")
        return self._steps(*self._ranges(weight.double()))

    def fitted(self, weight: Tensor, importance: Tensor) -> Scales:
        """Steps and zeros for a matrix (out, in) whose groups may clip their extreme values to get finer steps.

        Every group tries fractions of its range and takes the one with the least Σ importance · (value - nearest point)².

        Args:
            importance: (in,) not negative, the weight of a squared error in each column.
        """
        scales = self.scales(weight)
        low, high = self._ranges(weight.double())
        # float32 is precise enough to compare two ranges
        values, counts = self._grouped(weight.float()), self._grouped(importance[None].float())
        least = self._lost(values, counts, scales)
        for part in _SHRUNK[1:]:
            tried = self._steps(low * part, high * part)
            lost = self._lost(values, counts, tried)
            better = lost < least
            least = torch.where(better, lost, least)
            zeros = None if scales.zeros is None or tried.zeros is None else torch.where(better, tried.zeros, scales.zeros)
            scales = Scales(torch.where(better, tried.steps, scales.steps), zeros)
        return scales

    def _lost(self, values: Tensor, counts: Tensor, scales: Scales) -> Tensor:
        """Weighted squared errors (out, groups) of values (out, groups, width) rounded to the nearest point."""
        steps = scales.steps.float()[..., None]
        zeros = self.middle if scales.zeros is None else scales.zeros.float()[..., None]
        nearest = (values / steps).round_().add_(zeros).clamp_(0, self.top).sub_(zeros).mul_(steps)
        return nearest.sub_(values).square_().mul_(counts).sum(2)

    def _steps(self, low: Tensor, high: Tensor) -> Scales:
        largest = torch.maximum(-low, high)
        if self.kind == "mxint":
            exponents = torch.frexp(largest).exponent - 1 - (self.bits - 2)
            exponents = torch.where(largest > 0, exponents, 0)
            return Scales(powers(exponents.clamp(1 - _BIAS, 255 - _BIAS) + _BIAS).double())
        if self.symmetric:
            return Scales(_rounded(largest / (self.top / 2)))
        steps = _rounded((high - low) / self.top)
        return Scales(steps, (-low / steps).round().clamp(0, self.top).to(torch.uint8))

    def _ranges(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value of each group and 0; (out, groups) each."""
        padded = self._grouped(weight)
        return padded.amin(2).clamp_max(0), padded.amax(2).clamp_min(0)

    def _grouped(self, values: Tensor) -> Tensor:
        """(out, in) as (out, groups, width); an incomplete last group is padded with zeros."""
        out_features, in_features = values.shape
        width, groups = self.width(in_features), self.groups(in_features)
        if groups * width > in_features:
            values = torch.nn.functional.pad(values, (0, groups * width - in_features))
        return values.reshape(out_features, groups, width)

    def encode(self, weight: Tensor, scales: Scales) -> Tensor:
        """Codes (out, in) uint8 of the grid's points nearest to a matrix (out, in); computed in float64."""
        # by groups: expanding steps and zeros to the size of the weight would take longer than all the rest
        values = self._grouped(weight.double()) / scales.steps[..., None]
        offset = self.middle if scales.zeros is None else scales.zeros[..., None]
        codes = values.round_().add_(offset).clamp_(0, self.top).to(torch.uint8)
        return codes.flatten(1)[:, : weight.shape[1]].contiguous()

    def decode(self, codes: Tensor, scales: Scales, dtype: torch.dtype) -> Tensor:
        """The matrix (out, in) that codes (out, in) represent, computed and returned in `dtype`."""
        # a step below the range of float16 can still give values within that range
        wide = torch.float32 if self.kind == "mxint" and dtype == torch.float16 else dtype
        # by groups, as in `encode`: five times as fast
        values = self._grouped(codes).to(wide)
        values.sub_(self.middle if scales.zeros is None else scales.zeros.to(wide)[..., None])
        values = values.mul_(scales.steps.to(wide)[..., None]).flatten(1)[:, : codes.shape[1]]
        return values.to(dtype).contiguous()

    def spec(self) -> dict[str, Any]:
        """What a loader must know, as JSON: the arguments of this class."""
        return {"bits": self.bits, "group_size": self.group_size, "kind": self.kind, "symmetric": self.symmetric}


def _rounded(steps: Tensor) -> Tensor:
    """Steps rounded to eight significant bits; a group of zeros has step 1."""
    steps = steps.to(torch.bfloat16).double()
    return torch.where(steps > 0, steps, 1.0)


def exponents_of(steps: Tensor) -> Tensor:
    """The stored exponents (…) uint8 of steps that are powers of two."""
    return (torch.frexp(steps).exponent - 1 + _BIAS).to(torch.uint8)


def powers(exponents: Tensor) -> Tensor:
    """Steps (…) float32 of stored exponents 1 to 254; made from their bits, because `exp2` may not be exact."""
    return (exponents.to(torch.int32) << 23).view(torch.float32)


def packed_width(count: int, bits: int) -> int:
    """Bytes of a row of `count` codes."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (rows, n) uint8, each below 2^bits -> (rows, ⌈n·bits/8⌉) uint8, least significant bit first."""
    rows, count = codes.shape
    if bits == 8:
        return codes.contiguous()
    # eight codes fill `bits` whole bytes
    eights = torch.nn.functional.pad(codes, (0, -count % 8)).view(rows, -(-count // 8), 8)
    words = torch.zeros(eights.shape[:2], dtype=torch.int64, device=codes.device)
    for place in range(8):
        words |= eights[..., place].to(torch.int64) << (bits * place)
    parts = [((words >> (8 * byte)) & 255).to(torch.uint8) for byte in range(bits)]
    return torch.stack(parts, dim=-1).view(rows, -1)[:, : packed_width(count, bits)].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: (rows, ⌈count·bits/8⌉) uint8 -> (rows, count) uint8."""
    rows, width = packed.shape
    if bits == 8:
        return packed
    if 8 % bits == 0:
        codes = torch.stack([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], dim=-1)
        return codes.view(rows, -1)[:, :count]
    parts = torch.nn.functional.pad(packed, (0, -width % bits)).view(rows, -(-width // bits), bits)
    wide = torch.int32 if 8 * bits < 32 else torch.int64
    words = torch.zeros(parts.shape[:2], dtype=wide, device=packed.device)
    for byte in range(bits):
        words |= parts[..., byte].to(wide) << (8 * byte)
    codes = torch.stack([((words >> (bits * place)) & (2**bits - 1)).to(torch.uint8) for place in range(8)], dim=-1)
    return codes.view(rows, -1)[:, :count]
