"""Product by the sparse codes of a dictionary: y = codes z + bias (+ residual), z = atoms x, the codes as they are stored.

A checkpoint holds the nonzero codes row by row and their support in bits (compress/forms/dictionary.py): one bit for each
entry, or for the 2:4 pattern two positions of two bits for each four entries. Neither is expanded in memory.

A support with more entries than there are values (a damaged file) reads none past the last one.

* `_few_rows`, up to 4 rows of input. A free support: the bits of a row are read eight at a time, their running count says which
  value belongs to which column. 2:4: the positions gather from z.
* `sparse_dense`: the codes (out, k) with their zeros, written in one pass, for a dense product of many rows. torch needs a
  running count of all out · k entries in 64 bits for it.
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

FEW = 4  # rows up to which codes are multiplied as they are


class Sparse(NamedTuple):
    """Sparse codes (out, k) as a checkpoint stores them.

    Args:
        values: (nonzeros,) row by row.
        support: (bytes,) uint8.
        starts: (out,) int32, the number of values before each row; None for the 2:4 pattern, whose rows have k / 2 each.
        outputs, atoms: out and k.
    """

    values: Tensor
    support: Tensor
    starts: Tensor | None
    outputs: int
    atoms: int


def why_not(z: Tensor, sparse: Sparse) -> str:
    """Why the kernels cannot take these tensors; empty where they can."""
    if z.dtype != sparse.values.dtype:
        return "input and codes differ in dtype"
    if sparse.values.numel() >= 1 << 31:
        return "there are 2^31 codes or more"
    return why_not_here(z, *sparse[:3])


def why_not_product(z: Tensor, sparse: Sparse) -> str:
    """The same for `sparse_product`, which takes few rows."""
    if z.numel() > FEW * sparse.atoms:
        return f"there are more than {FEW} rows of input"
    return why_not(z, sparse)


def dense_reference(sparse: Sparse) -> Tensor:
    """The codes (out, k) with their zeros, by torch's operations."""
    bits = (sparse.support[:, None].int() >> torch.arange(8, device=sparse.support.device)) & 1
    bits = bits.flatten()[: sparse.outputs * sparse.atoms].view(sparse.outputs, sparse.atoms)
    if sparse.starts is None:
        position = (bits[:, 0::2] + 2 * bits[:, 1::2]).view(sparse.outputs, -1, 2)
        bits = torch.nn.functional.one_hot(position.long(), 4).sum(2).view(sparse.outputs, sparse.atoms)
    codes = torch.zeros(bits.shape, dtype=sparse.values.dtype, device=sparse.values.device)
    return codes.masked_scatter(bits.bool(), sparse.values)


def reference(z: Tensor, sparse: Sparse, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """What `sparse_product` computes, by torch's operations."""
    y = torch.nn.functional.linear(z, dense_reference(sparse), bias)
    return y if residual is None else y + residual


@triton.jit
def _eight(support, n, inside, byte, K, size):
    """Bytes (BN, BB) int32 of the support: bits 8 · byte to 8 · byte + 7 of the rows n (BN,) int64, which begin at any bit."""
    bit = n[:, None] * K + 8 * byte[None, :]
    at, shift = bit // 8, (bit % 8).to(tl.int32)
    here = inside[:, None] & (8 * byte < K)[None, :]
    low = tl.load(support + at, mask=here, other=0).to(tl.int32)
    high = tl.load(support + at + 1, mask=here & (at + 1 < size), other=0).to(tl.int32)
    return (low | (high << 8)) >> shift


@triton.jit
def _places(
    support, n, inside, start, before, K, size,
    BN: tl.constexpr, BB: tl.constexpr, TWO_OF_FOUR: tl.constexpr,
):  # fmt: skip
    """Whether entries (BN, 8 BB) from column `start` on are there, each one's value, and the values before the next.

    before: (BN,) the number of values before these columns.
    """
    byte = start // 8 + tl.arange(0, BB)
    eight = _eight(support, n, inside, byte, K, size)[:, :, None]
    column = tl.arange(0, 8)[None, None, :]
    if TWO_OF_FOUR:
        four = column // 4 * 4
        first, second = (eight >> four) & 3, (eight >> (four + 2)) & 3
        there = (column % 4 == first) | (column % 4 == second)
        there = tl.reshape(there & (inside[:, None, None]) & (8 * byte[None, :, None] + column < K), (BN, 8 * BB))
        place = 4 * (byte - start // 8)[None, :, None] + four // 2 + (column % 4 == second).to(tl.int32)
        value = before[:, None] + tl.reshape(place, (BN, 8 * BB))
        return there, value, before + 4 * BB
    else:
        bit = tl.reshape((eight >> column) & 1, (BN, 8 * BB))
        bit = tl.where(inside[:, None] & (start + tl.arange(0, 8 * BB) < K)[None, :], bit, 0)
        return bit != 0, before[:, None] + tl.cumsum(bit, axis=1) - bit, before + tl.sum(bit, axis=1)


@triton.jit
def _first(starts, n, inside, K, TWO_OF_FOUR: tl.constexpr):
    if TWO_OF_FOUR:
        return (n * (K // 2)).to(tl.int32)
    else:  # Triton compiles what follows a return in a branch too
        return tl.load(starts + n, mask=inside, other=0)


@triton.jit
def _few_rows(
    z, values, support, starts, bias, residual, y, M, N, K, size, count, z_stride, residual_stride,
    TWO_OF_FOUR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    m, n = tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    lines, inside = n.to(tl.int64), n < N
    before = _first(starts, lines, inside, K, TWO_OF_FOUR)
    if TWO_OF_FOUR:  # half as many entries, each at a column of its own
        total = tl.zeros((BM, BN, BB * 4), tl.float32)
        entry = tl.arange(0, 4)[None, None, :]
        for start in range(0, K, BB * 8):
            byte = start // 8 + tl.arange(0, BB)
            eight = _eight(support, lines, inside, byte, K, size)[:, :, None]
            column = 8 * byte[None, :, None] + entry // 2 * 4 + ((eight >> 2 * entry) & 3)
            there = inside[:, None, None] & (8 * byte[None, :, None] + entry // 2 * 4 < K)
            place = before[:, None, None] + 4 * byte[None, :, None] + entry
            column, there = tl.reshape(column, (BN, BB * 4)), tl.reshape(there, (BN, BB * 4))
            value = tl.load(values + tl.reshape(place, (BN, BB * 4)), mask=there, other=0.0).to(tl.float32)
            at = z + (m * z_stride)[:, None, None] + column[None, :, :]
            total += tl.load(at, mask=(m < M)[:, None, None] & there[None, :, :], other=0.0).to(tl.float32) * value[None, :, :]
    else:
        total = tl.zeros((BM, BN, BB * 8), tl.float32)
        column = tl.arange(0, BB * 8)
        for start in range(0, K, BB * 8):
            there, place, before = _places(support, lines, inside, start, before, K, size, BN, BB, TWO_OF_FOUR)
            value = tl.load(values + place, mask=there & (place < count), other=0.0).to(tl.float32)
            at = z + m[:, None] * z_stride + (start + column)[None, :]
            given = tl.load(at, mask=(m < M)[:, None] & (start + column < K)[None, :], other=0.0).to(tl.float32)
            total += given[:, None, :] * value[None, :, :]
    sums = tl.sum(total, axis=2)
    here = (m < M)[:, None] & inside[None, :]
    if bias is not None:
        sums += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        sums += tl.load(residual + m[:, None] * residual_stride + n[None, :], mask=here, other=0.0).to(tl.float32)
    tl.store(y + m[:, None] * N + n[None, :], sums.to(y.dtype.element_ty), mask=here)


@triton.jit
def _dense(
    values, support, starts, y, N, K, size, count,
    TWO_OF_FOUR: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    lines, inside, column = n.to(tl.int64), n < N, tl.arange(0, BB * 8)
    before = _first(starts, lines, inside, K, TWO_OF_FOUR)
    for start in range(0, K, BB * 8):
        there, place, before = _places(support, lines, inside, start, before, K, size, BN, BB, TWO_OF_FOUR)
        value = tl.load(values + place, mask=there & (place < count), other=0.0)
        within = inside[:, None] & (start + column < K)[None, :]
        tl.store(y + lines[:, None] * K + (start + column)[None, :], value, mask=within)


def _fake(
    z: Tensor, values: Tensor, support: Tensor, starts: Tensor | None, sizes: list[int],
    bias: Tensor | None, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    return z.new_empty(*z.shape[:-1], sizes[0])


@operator("sparse_product", _fake)
def _product(
    z: Tensor, values: Tensor, support: Tensor, starts: Tensor | None, sizes: list[int],
    bias: Tensor | None, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    outputs, atoms = sizes
    flat = rows_of(z)
    y = torch.empty(len(flat), outputs, dtype=z.dtype, device=z.device)
    if y.numel():
        added = None if residual is None else rows_of(residual)
        given = (flat, values, support, starts, bias, added, y, len(flat), outputs, atoms, support.numel(), values.numel())
        strides = (flat.stride(0), 0 if added is None else added.stride(0))
        size = {"BM": power_of_two(len(flat)), "BN": 4, "BB": min(64, max(4, power_of_two(-(-atoms // 8))))}
        _few_rows[triton.cdiv(outputs, 4),](*given, *strides, TWO_OF_FOUR=starts is None, **size, num_warps=4)
    return y.view(*z.shape[:-1], outputs)


def sparse_product(z: Tensor, sparse: Sparse, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Multiply up to 4 rows by sparse codes; `why_not_product` says where it cannot.

    Args:
        z: (..., k).
        sparse: (out, k) codes in the dtype of z.
        bias: (out,) or None.
        residual: (..., out) or None, added to the result.

    Returns:
        (..., out) in the dtype of z.
    """
    return _product(z, *sparse[:3], list(sparse[3:]), bias, residual)


def _fake_dense(values: Tensor, support: Tensor, starts: Tensor | None, sizes: list[int]) -> Tensor:
    return values.new_empty(sizes)


@operator("sparse_dense", _fake_dense)
def _write_dense(values: Tensor, support: Tensor, starts: Tensor | None, sizes: list[int]) -> Tensor:
    outputs, atoms = sizes
    y = torch.empty(outputs, atoms, dtype=values.dtype, device=values.device)
    size = {"BN": 4, "BB": min(64, max(4, power_of_two(-(-atoms // 8))))}
    given = (values, support, starts, y, outputs, atoms, support.numel(), values.numel())
    _dense[triton.cdiv(outputs, 4),](*given, TWO_OF_FOUR=starts is None, **size, num_warps=4)
    return y


def sparse_dense(sparse: Sparse) -> Tensor:
    """The codes (out, k) with their zeros, in the dtype of the values."""
    return _write_dense(*sparse[:3], list(sparse[3:]))
