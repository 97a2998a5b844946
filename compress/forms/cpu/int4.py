"""Products by codes on the CPU: codes stay packed in memory, and torch's own 4-bit kernel multiplies by them.

The kernel (`_weight_int4pack_mm_for_cpu`) reads half a byte per weight, which decides the speed for a few rows of input. For
many rows it is slower than a dense product, because it decodes every weight again for each block of rows. There the codes
are decoded for a dense product, a few tiles of rows of the matrix at a time, so that decoded weights stay in the cache. Both
read one copy of the codes, in the kernel's layout:

    packed[t, k, j] = code[64 t + j, k] + 16 code[64 t + 32 + j, k]        for 64 rows t, an input k, and j below 32

That layout is torch's own matter and depends on the processor: `available` compares it with what torch packs here.

torch's formula is (code - 8) scale + offset. Codes of fewer bits are shifted: the grid's middle code becomes 8, and a zero z of
the grid becomes the offset (middle - z) step. Both terms are then as small as they can be, and little is lost in 16 bits.

Codes of 5 to 8 bits are two planes of 4 bits, and their product is the sum of two of the kernel's. The middle code becomes 128,
and then code = 16 high + low, so that

    (code - 128) step + offset = [(high - 8) 16 step + coarse] + [(low - 8) step + 8 step + fine]

where coarse is the offset rounded to 16 bits, and fine is what the rounding lost. torch's 8-bit kernel (`_weight_int8pack_mm`)
has one step for a whole row and no zeros, so it cannot multiply by groups.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..grids import Grid, Scales
from .decoding import decode_tiles
from .threads import has_numba

TILE = 64  # rows of the matrix in one block of the layout
GROUPS = (256, 128, 64, 32)  # group sizes that the kernel knows
DTYPES = (torch.bfloat16,)  # in float32 torch has a plain loop, a hundred times slower than a dense product
MIDDLES = (8, 128)  # what the middle code becomes with one plane, and with two
# planes -> rows of input from which decoding and a dense product are faster (576 x 1536 to 4096 x 4096, one thread)
DENSE_FROM = {1: 80, 2: 40}
AT_ONCE = 1 << 20  # codes that are decoded at a time for a dense product: 2 MiB of 16-bit weights, about a core's own cache
# torch's threads up to which numba's one is faster (measured: 1 and 2; with more torch decodes in all of them)
_ONE_DECODES = 2
_ONES = 0x4300  # the bits of 128 in bfloat16; a code below 128 fits into the last seven, and the number is then 128 + code


@dataclass(frozen=True)
class Packed:
    """Codes of up to 8 bits in the kernel's layout.

    Args:
        codes: (planes, rows of the padded matrix, in / 2) uint8; two planes hold the high and the low half of each code.
        scales: (planes, groups, rows of the padded matrix, 2): step and offset of each group.
        rows: of the matrix without the padding.
        group: inputs that share a step.
        middle: the grid's middle code.
    """

    codes: Tensor
    scales: Tensor
    rows: int
    group: int
    middle: int

    @property
    def shift(self) -> int:
        """What was added to each code of the grid."""
        return MIDDLES[len(self.codes) - 1] - self.middle

    def steps(self, groups: int) -> Tensor:
        """(out, groups), exactly as they were given; the kernel's groups may be parts of these."""
        return self.scales[-1, :: self.scales.shape[1] // groups, : self.rows, 0].T.contiguous()

    def zeros(self) -> Tensor:
        """(groups, rows of the padded matrix) float32: the codes of the value 0 as whole numbers, before the shift."""
        steps, offsets = self.scales.float().unbind(-1)
        offset = offsets[0] if len(steps) == 1 else offsets[0] + (offsets[1] - 8 * steps[1])
        return self.middle - (offset / steps[-1]).round()


def kernel_group(grid: Grid, in_features: int) -> int | None:
    """The group size for the kernel: the largest one that divides the grid's groups; None where there is none."""
    width = grid.width(in_features)
    return next((group for group in GROUPS if width % group == 0 and in_features % width == 0), None)


def pack_codes(grid: Grid, codes: Tensor, scales: Scales, dtype: torch.dtype) -> Packed:
    """Pack codes for the kernel.

    Args:
        grid: of the codes; `kernel_group` has a group for it.
        codes: (out, in) uint8.
        scales: of its groups; the dtype represents the steps exactly.
        dtype: of the products.
    """
    rows, columns = codes.shape
    group = kernel_group(grid, columns)
    assert group is not None
    steps = scales.steps.detach().float()
    zeros = torch.full_like(steps, grid.middle) if scales.zeros is None else scales.zeros.float()
    offsets = (grid.middle - zeros) * steps
    if grid.bits <= 4:
        planes = [(codes + (MIDDLES[0] - grid.middle), steps, offsets)]
    else:
        shifted, coarse = codes + (MIDDLES[1] - grid.middle), offsets.to(dtype).float()
        planes = [(shifted >> 4, 16 * steps, coarse), (shifted & 15, steps, 8 * steps + (offsets - coarse))]
    packed = [_pack_plane(*plane, columns // steps.shape[1] // group, dtype) for plane in planes]
    return Packed(torch.stack([p for p, _ in packed]), torch.stack([s for _, s in packed]), rows, group, grid.middle)


def _pack_plane(codes: Tensor, steps: Tensor, offsets: Tensor, times: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    pairs = torch.stack([steps, offsets], dim=-1).repeat_interleave(times, dim=1)  # (out, groups, 2)
    if padding := -codes.shape[0] % TILE:
        codes = torch.nn.functional.pad(codes, (0, 0, 0, padding))
        pairs = torch.nn.functional.pad(pairs, (0, 0, 0, 0, 0, padding), value=1)  # a step that can be divided by
    return (
        torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1),
        pairs.transpose(0, 1).to(dtype).contiguous(),
    )


def unpack_codes(packed: Packed) -> Tensor:
    """The codes (out, in) uint8 again."""
    columns = 2 * packed.codes.shape[2]
    planes = []
    for plane in packed.codes:
        # bytes are transposed while they hold two codes each, so that all that follows runs along rows
        halves = plane.view(-1, columns, TILE // 2).transpose(1, 2).contiguous()
        planes.append(torch.stack([halves & 15, halves >> 4], dim=1).view(-1, columns)[: packed.rows])
    codes = planes[0] if len(planes) == 1 else planes[0] * 16 + planes[1]
    return codes - packed.shift if packed.shift else codes


def decoded(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The matrix (out, in) that the codes represent, computed and returned in `dtype`."""
    zeros = packed.zeros()[:, : packed.rows].T
    grouped = unpack_codes(packed).view(packed.rows, -1, packed.group).to(dtype)
    return grouped.sub_(zeros.to(dtype)[..., None]).mul_(packed.steps(len(zeros.T)).to(dtype)[..., None]).view(packed.rows, -1)


def _decoded_tiles(packed: Packed) -> Iterator[Tensor]:
    """The same matrix in bfloat16, by blocks (tiles, in, 64): 64 rows in a tile, transposed."""
    planes, padded, columns = len(packed.codes), packed.codes.shape[1], 2 * packed.codes.shape[2]
    halves = packed.codes.view(planes, -1, columns, TILE // 2)
    by_tile = (-1, padded // TILE, TILE)  # (groups, tiles, 64)
    zeros = (packed.zeros() + packed.shift + (128 if planes == 1 else 0)).to(torch.bfloat16)
    # contiguous: torch's loops over strides are five times as slow
    zeros, steps = (v.reshape(by_tile).transpose(0, 1).contiguous()[:, :, None] for v in (zeros, packed.scales[-1, ..., 0]))
    count = max(1, AT_ONCE // (TILE * columns))
    for first in range(0, padded // TILE, count):
        part = slice(first, first + count)
        codes = _unpacked_tiles(halves[0, part])
        if planes == 1:
            values = codes.bitwise_or_(_ONES).view(torch.bfloat16)
        else:
            values = codes.bitwise_left_shift_(4).bitwise_or_(_unpacked_tiles(halves[1, part])).to(torch.bfloat16)
        values = values.view(len(codes), -1, packed.group, TILE)
        yield values.sub_(zeros[part]).mul_(steps[part]).view(len(codes), columns, TILE)


def _compiled_blocks(packed: Packed) -> Iterator[Tensor]:
    """The same matrix in bfloat16, by blocks (in, 64 · tiles), transposed; decoded by the calling thread alone.

    torch's own threads still spin when a product is done, and take from others what they would gain.
    """
    planes, padded, columns = len(packed.codes), packed.codes.shape[1], 2 * packed.codes.shape[2]
    halves = packed.codes.view(planes, -1, columns, TILE // 2)
    zeros, steps = (
        each.float().reshape(-1, padded // TILE, TILE).transpose(0, 1)  # (tiles, groups, 64)
        for each in (packed.zeros() + packed.shift, packed.scales[-1, ..., 0])
    )
    count = max(1, AT_ONCE // (TILE * columns))
    for first in range(0, padded // TILE, count):
        part = slice(first, first + count)
        yield decode_tiles(halves[:, part], zeros[part], steps[part])


def _unpacked_tiles(halves: Tensor) -> Tensor:
    """(tiles, in, 32) bytes of two codes as (tiles, in, 2, 32) int16."""
    codes = torch.empty(*halves.shape[:2], 2, TILE // 2, dtype=torch.int16)
    wide = halves.to(torch.int16)
    torch.bitwise_and(wide, 15, out=codes[:, :, 0])
    torch.bitwise_right_shift(wide, 4, out=codes[:, :, 1])
    return codes


def multiply(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """`matrix x + bias` for an input (..., in) in the dtype of the scales."""
    flat = x.reshape(-1, x.shape[-1])
    if flat.shape[0] < DENSE_FROM[len(packed.codes)]:
        flat = flat.contiguous()
        y = _by_kernel(flat, packed, 0)
        if len(packed.codes) == 2:
            y += _by_kernel(flat, packed, 1)
        y = y[:, : packed.rows]
    elif torch.compiler.is_compiling():  # the compiler makes one loop of all that decodes a matrix
        return torch.nn.functional.linear(x, decoded(packed, x.dtype), bias)
    elif has_numba() and torch.get_num_threads() <= _ONE_DECODES:
        y = torch.cat([flat @ block for block in _compiled_blocks(packed)], 1)[:, : packed.rows]
    else:
        tiles = [torch.bmm(flat.expand(len(block), -1, -1), block) for block in _decoded_tiles(packed)]  # (tiles, tokens, 64)
        y = torch.cat(tiles).transpose(0, 1).flatten(1)[:, : packed.rows]
    y = y.reshape(*x.shape[:-1], packed.rows)
    return y if bias is None else y + bias


def _by_kernel(flat: Tensor, packed: Packed, plane: int) -> Tensor:
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, packed.codes[plane], packed.group, packed.scales[plane])
    return y


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
    return whole and torch.equal(unpack_codes(Packed(packed[None], packed, 2 * TILE, 64, MIDDLES[0])), codes)
