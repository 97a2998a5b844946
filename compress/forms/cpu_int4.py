"""Products by 4-bit codes on the CPU: codes stay packed in memory, and torch's own kernel multiplies by them.

The kernel (`_weight_int4pack_mm_for_cpu`) reads half a byte per weight, which decides the speed for a few rows of input. For
many rows it is slower than a dense product, because it decodes every weight again for each block of rows. There the codes
are decoded for one dense product. Both read one copy of the codes, in the kernel's layout:

    packed[t, k, j] = code[64 t + j, k] + 16 code[64 t + 32 + j, k]        for 64 rows t, an input k, and j below 32

That layout is torch's own matter and depends on the processor: `available` compares it with what torch packs here.

torch's formula is (code - 8) scale + offset. Codes of fewer bits are shifted: the grid's middle code becomes 8, and a zero z of
the grid becomes the offset (middle - z) step. Both terms are then as small as they can be, and little is lost in 16 bits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .grids import Grid, Scales

TILE = 64  # rows of the matrix in one block of the layout
GROUPS = (256, 128, 64, 32)  # group sizes that the kernel knows
DTYPES = (torch.bfloat16,)  # in float32 torch has a plain loop, a hundred times slower than a dense product
MIDDLE = 8  # the code that the kernel subtracts
# From this many rows of input on, decoding and a dense product are faster (576 x 576 to 4096 x 4096, one thread).
DENSE_FROM = 64


@dataclass(frozen=True)
class Packed:
    """Codes of up to 4 bits in the kernel's layout.

    Args:
        codes: (rows of the padded matrix, in / 2) uint8.
        scales: (groups, rows of the padded matrix, 2): step and offset of each group.
        rows: of the matrix without the padding.
        group: inputs that share a step.
        middle: the grid's middle code.
    """

    codes: Tensor
    scales: Tensor
    rows: int
    group: int
    middle: int


def kernel_group(grid: Grid, in_features: int) -> int | None:
    """The group size for the kernel: the largest one that divides the grid's groups; None where there is none."""
    width = grid.width(in_features)
    return next((group for group in GROUPS if width % group == 0 and in_features % width == 0), None)


def pack_codes(grid: Grid, codes: Tensor, scales: Scales, dtype: torch.dtype) -> Packed:
    """Pack codes for the kernel.

    Args:
        grid: of the codes, at most 4 bits; `kernel_group` has a group for it.
        codes: (out, in) uint8.
        scales: of its groups.
        dtype: of the products.
    """
    rows, columns = codes.shape
    group = kernel_group(grid, columns)
    assert group is not None
    steps = scales.steps.detach().float()
    zeros = torch.full_like(steps, grid.middle) if scales.zeros is None else scales.zeros.float()
    times = grid.width(columns) // group
    pairs = torch.stack([steps, (grid.middle - zeros) * steps], dim=-1).repeat_interleave(times, dim=1)  # (out, groups, 2)
    padding = -rows % TILE
    if padding:
        codes = torch.nn.functional.pad(codes, (0, 0, 0, padding))
        pairs = torch.nn.functional.pad(pairs, (0, 0, 0, 0, 0, padding))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int() + (MIDDLE - grid.middle), 1)
    return Packed(packed, pairs.transpose(0, 1).to(dtype).contiguous(), rows, group, grid.middle)


def unpack_codes(packed: Packed) -> Tensor:
    """The codes (out, in) uint8 again."""
    columns = 2 * packed.codes.shape[1]
    # bytes are transposed while they hold two codes each, so that all that follows runs along rows
    halves = packed.codes.view(-1, columns, TILE // 2).transpose(1, 2).contiguous()
    codes = torch.stack([halves & 15, halves >> 4], dim=1).view(-1, columns)[: packed.rows]
    return codes if packed.middle == MIDDLE else codes - (MIDDLE - packed.middle)


def decoded(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The matrix (out, in) that the codes represent, computed and returned in `dtype`."""
    steps, offsets = packed.scales[:, : packed.rows].transpose(0, 1).unbind(-1)  # (out, groups) each
    zeros = packed.middle - (offsets.float() / steps.float()).round()
    grouped = unpack_codes(packed).view(packed.rows, -1, packed.group).to(dtype)
    return grouped.sub_(zeros.to(dtype)[..., None]).mul_(steps.to(dtype)[..., None]).view(packed.rows, -1)


def multiply(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """`matrix x + bias` for an input (..., in) in the dtype of the scales."""
    flat = x.reshape(-1, x.shape[-1])
    if flat.shape[0] >= DENSE_FROM:
        return torch.nn.functional.linear(x, decoded(packed, x.dtype), bias)
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat.contiguous(), packed.codes, packed.group, packed.scales)
    y = y[:, : packed.rows].reshape(*x.shape[:-1], packed.rows)
    return y if bias is None else y + bias


@functools.cache
def available() -> bool:
    """Whether torch has the kernel here, and its layout is the one that this file reads."""
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return False
    codes = torch.arange(2 * TILE * 64).reshape(2 * TILE, 64).mul(7).remainder(13).to(torch.uint8)
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    except RuntimeError:
        return False
    whole = packed.shape == (2 * TILE, 32) and packed.dtype == torch.uint8
    return whole and torch.equal(unpack_codes(Packed(packed, packed, 2 * TILE, 64, MIDDLE)), codes)
