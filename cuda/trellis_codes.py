"""Product by the codes of a bitshift trellis: y = W x, the codes as they are stored (compress/forms/codes/code.py).

A tile of 16 x 16 values is `bits` times 16 words of 16 bits, one for each of its rows. A row's values are windows of
`state_bits` bits on its words, and the last ones reach into the first word of the row before it. A state's value is the sum of
the four bytes of its product with a number, less 510, times a unit: a thread computes it in registers and reads no table.

The sum becomes a float without an integer conversion, which GPUs do slowly: in the mantissa of 2^23 it is 2^23 + sum.

* `_few_rows`, up to 4 rows of input: Σ (sum - 510) x in float32, without tensor cores.
* `trellis_dense`: the matrix written out in one pass, transposed, for products of many rows.

Rotations and scales are not in it: `EncodedLinear` applies them to the input and to the output.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

try:  # transformers demands what a copied file imports, but for try blocks; dispatch.py says when this file is imported
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("this file needs Triton: pip install 'lrc[triton]'") from error

from .dispatch import operator, power_of_two
from .dispatch import why_not as why_not_here
from .grouped_low_rank import rows_of

FEW = 4  # rows of input that `trellis_product` takes
SIDE = 16  # rows and columns of a tile


class Trellis(NamedTuple):
    """A matrix in a trellis code, as a checkpoint stores it.

    Args:
        codes: (tall · wide · 32 bits,) uint8.
        unit: what a sum of bytes is multiplied by.
        tall, wide: rows and columns of tiles.
        bits, state_bits: of the code.
        factor: of a state, below 2^32.
    """

    codes: Tensor
    unit: float
    tall: int
    wide: int
    bits: int
    state_bits: int
    factor: int


def why_not(x: Tensor, trellis: Trellis) -> str:
    """Why the kernels cannot take these tensors; empty where they can."""
    return why_not_here(x, trellis.codes)


def why_not_product(x: Tensor, trellis: Trellis) -> str:
    """The same for `trellis_product`, which takes few rows."""
    if x.numel() > FEW * x.shape[-1]:
        return f"there are more than {FEW} rows of input"
    return why_not(x, trellis)


def dense_reference(trellis: Trellis, dtype: torch.dtype) -> Tensor:
    """The (out, in) matrix of whole tiles that the codes stand for, in `dtype`, by torch's operations."""
    count, bits = trellis.tall * trellis.wide, trellis.bits
    low, high = trellis.codes.view(count, bits, SIDE, 2).long().unbind(3)
    words = low | high << 8
    words = torch.cat([words, words[:, :1].roll(1, 2)], 1)  # behind a row's last word, the first one of the row before it
    start = (SIDE - 1 - torch.arange(SIDE, device=words.device)) * bits
    window = (words[:, start // 16] | words[:, start // 16 + 1] << 16) >> (start % 16)[:, None]
    product = (window & ((1 << trellis.state_bits) - 1)) * trellis.factor & 0xFFFFFFFF
    sums = sum((product >> shift & 255 for shift in (0, 8, 16, 24)), torch.tensor(-510))
    values = (sums.float() * trellis.unit).view(trellis.tall, trellis.wide, SIDE, SIDE)  # columns before rows
    return values.permute(0, 3, 1, 2).reshape(trellis.tall * SIDE, trellis.wide * SIDE).to(dtype)


def reference(x: Tensor, trellis: Trellis) -> Tensor:
    """What `trellis_product` computes, by torch's operations."""
    return torch.nn.functional.linear(x, dense_reference(trellis, x.dtype))


@triton.jit
def _words(words, tile, row, inside, word: tl.constexpr, BITS: tl.constexpr):
    """The words (tiles, 16) int32 at `word` and the ones behind them in the upper half, of tiles (tiles,) and all rows."""
    start = tile[:, None] * (16 * BITS)
    low = tl.load(words + start + word * 16 + row[None, :], mask=inside[:, None], other=0).to(tl.int32) & 0xFFFF
    at = start + ((word + 1) * 16 + row if word + 1 < BITS else (row + 15) % 16)[None, :]
    high = tl.load(words + at, mask=inside[:, None], other=0).to(tl.int32) & 0xFFFF
    return (low | (high << 16)).to(tl.uint32, bitcast=True)


@triton.jit
def _values(pair, shift: tl.constexpr, STATE_BITS: tl.constexpr, FACTOR: tl.constexpr):
    """Sums of bytes less their mean, float32, of the states that begin at bit `shift` of each pair of words."""
    product = ((pair >> shift) & ((1 << STATE_BITS) - 1)) * FACTOR
    both = (product & 0x00FF00FF) + ((product >> 8) & 0x00FF00FF)
    total = (both & 0xFFFF) + (both >> 16)
    return (total | 0x4B000000).to(tl.float32, bitcast=True) - 8389118.0  # 2^23 + 510


@triton.jit
def _few_rows(
    x, words, y, unit, M, wide, x_stride,
    BITS: tl.constexpr, STATE_BITS: tl.constexpr, FACTOR: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    tall, m, c, row = tl.program_id(0).to(tl.int64), tl.arange(0, BM), tl.arange(0, BC), tl.arange(0, 16)
    total = tl.zeros((BM, BC, 16), tl.float32)
    for start in range(0, wide, BC):
        inside = start + c < wide
        tile = tall * wide + start + c
        given = (m < M)[:, None] & inside[None, :]
        for word in tl.static_range(BITS):
            pair = _words(words, tile, row, inside, word, BITS)
            for column in tl.static_range(16):
                if (15 - column) * BITS // 16 == word:
                    value = _values(pair, (15 - column) * BITS % 16, STATE_BITS, FACTOR)
                    at = x + m[:, None] * x_stride + (start + c)[None, :] * 16 + column
                    one = tl.load(at, mask=given, other=0.0).to(tl.float32)
                    total += one[:, :, None] * value[None, :, :]
    sums = tl.sum(total, axis=1) * unit
    at = y + m[:, None] * (tl.num_programs(0) * 16) + tall * 16 + row[None, :]
    tl.store(at, sums.to(y.dtype.element_ty), mask=(m < M)[:, None] & (row < 16)[None, :])


@triton.jit
def _dense(
    words, y, unit, tall, wide,
    BITS: tl.constexpr, STATE_BITS: tl.constexpr, FACTOR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    n, column_of_tiles, row = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64), tl.program_id(1), tl.arange(0, 16)
    inside, tile = n < tall, n * wide + column_of_tiles
    for word in tl.static_range(BITS):
        pair = _words(words, tile, row, inside, word, BITS)
        for column in tl.static_range(16):
            if (15 - column) * BITS // 16 == word:
                value = _values(pair, (15 - column) * BITS % 16, STATE_BITS, FACTOR) * unit
                at = y + (column_of_tiles * 16 + column).to(tl.int64) * (tall * 16) + n[:, None] * 16 + row[None, :]
                tl.store(at, value.to(y.dtype.element_ty), mask=inside[:, None] & (row < 16)[None, :])


def _whole_words(codes: Tensor) -> Tensor:
    """Bytes as words of 16 bits; copied where they begin within one."""
    return (codes.clone() if codes.storage_offset() % 2 else codes).view(torch.int16)


def _kind(sizes: list[int]) -> dict[str, int]:
    return dict(zip(("BITS", "STATE_BITS", "FACTOR"), sizes[2:], strict=True))


def _fake(x: Tensor, codes: Tensor, unit: float, sizes: list[int]) -> Tensor:
    return x.new_empty(*x.shape[:-1], sizes[0] * SIDE)


@operator("trellis_product", _fake)
def _product(x: Tensor, codes: Tensor, unit: float, sizes: list[int]) -> Tensor:
    tall, wide = sizes[:2]
    flat = rows_of(x)
    y = torch.empty(len(flat), tall * SIDE, dtype=x.dtype, device=x.device)
    if y.numel():
        # 16 columns of tiles at once are 256 values for each of the 16 columns in a tile: two for a thread
        size = {"BM": power_of_two(len(flat)), "BC": min(16, power_of_two(wide)), "num_warps": 4}
        _few_rows[tall,](flat, _whole_words(codes), y, unit, len(flat), wide, flat.stride(0), **_kind(sizes), **size)
    return y.view(*x.shape[:-1], tall * SIDE)


def trellis_product(x: Tensor, trellis: Trellis) -> Tensor:
    """Multiply up to 4 rows by a matrix in a trellis code; `why_not_product` says where it cannot.

    Args:
        x: (..., 16 wide), rotated and scaled.
        trellis: of the (16 tall, 16 wide) matrix.

    Returns:
        (..., 16 tall) in the dtype of x.
    """
    return _product(x, *trellis[:2], list(trellis[2:]))


def _fake_dense(codes: Tensor, unit: float, sizes: list[int], dtype: torch.dtype) -> Tensor:
    return codes.new_empty(sizes[1] * SIDE, sizes[0] * SIDE, dtype=dtype)


@operator("trellis_dense", _fake_dense)
def _write_dense(codes: Tensor, unit: float, sizes: list[int], dtype: torch.dtype) -> Tensor:
    tall, wide = sizes[:2]
    y = torch.empty(wide * SIDE, tall * SIDE, dtype=dtype, device=codes.device)
    size = {"BN": min(16, power_of_two(tall)), "num_warps": 4}
    grid = (triton.cdiv(tall, size["BN"]), wide)
    _dense[grid](_whole_words(codes), y, unit, tall, wide, **_kind(sizes), **size)
    return y


def trellis_dense(trellis: Trellis, dtype: torch.dtype) -> Tensor:
    """The (16 tall, 16 wide) matrix that the codes stand for, computed in float32 and rounded to `dtype`.

    It is a view of its transposed, in whose order it is written.
    """
    return _write_dense(*trellis[:2], list(trellis[2:]), dtype).T
