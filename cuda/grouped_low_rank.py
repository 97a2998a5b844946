"""Grouped low-rank product: y_i = left_i (right_i x) + bias_i (+ residual), for all matrices that read one input x.

The right factors of the group lie one below the other in one matrix (Σ rank, in); the left ones, each (out_i, rank_i) with its
own rank, one behind the other in a flat tensor. Two launches do what takes two for each matrix otherwise: the first computes
z = right x for the whole group, the second the block-diagonal product of the left factors, with bias and residual.

One kernel does both. Each program computes some output columns, and a table says for each program which columns these are,
where its rows of the matrix begin, how wide they are, and which columns of the input they read. It has two versions:

* `_few_rows`, up to 4 rows of input (decoding): every weight is read once, products are summed in float32 without tensor cores,
  and the sums over the width stay in registers to the end, so that no partial sums are added in another launch.
* `_many_rows`: tiles on tensor cores with float32 sums. Up to 64 rows of input the tile has few rows, so that reading the
  weights decides; beyond (prefill) it is square.

z has the input's dtype, as between two torch products.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

try:  # transformers demands what a copied file imports, but for try blocks; dispatch.py says when this file is imported
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("this file needs Triton: pip install 'lrc[triton]'") from error

from .dispatch import INTERPRETED, alignment, operator, power_of_two
from .dispatch import why_not as why_not_here

FEW = 4  # rows up to which no tensor cores are used
_TABLE: dict[tuple[Any, ...], Tensor] = {}


def why_not(x: Tensor, right: Tensor, left: Tensor, ranks: Sequence[int]) -> str:
    """Why the kernel cannot take these tensors; empty where it can."""
    if x.dtype != right.dtype or x.dtype != left.dtype:
        return "input and factors differ in dtype"
    if max(ranks, default=0) > 1 << 20 or x.shape[-1] > 1 << 20:
        return "a matrix is wider than 1048576"
    return why_not_here(x, right, left)


def reference(
    x: Tensor,
    right: Tensor,
    left: Tensor,
    ranks: Sequence[int],
    outs: Sequence[int],
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """What `grouped_low_rank` computes, by torch's operations."""
    z = torch.nn.functional.linear(x, right)
    parts, first = [], 0
    for part, rank, out in zip(z.split(list(ranks), -1), ranks, outs, strict=True):
        parts.append(torch.nn.functional.linear(part, left[first : first + out * rank].view(out, rank)))
        first += out * rank
    y = torch.cat(parts, -1)
    y = y if bias is None else y + bias
    return y if residual is None else y + residual


def stack(rights: Sequence[Tensor], lefts: Sequence[Tensor], multiple: int = 16) -> tuple[Tensor, Tensor, list[int]]:
    """Lay the factors of a group out for the kernel.

    Args:
        rights: (rank_i, in) each.
        lefts: (out_i, rank_i) each.
        multiple: ranks are filled up with zeros to a multiple of this. Rows that begin at 16 bytes are read in one piece.

    Returns:
        right (Σ rank, in), left (Σ out · rank,), and the ranks.
    """
    padded = [(0, -right.shape[0] % multiple) for right in rights]
    below = [torch.nn.functional.pad(right, (0, 0, *pad)) for right, pad in zip(rights, padded, strict=True)]
    beside = [torch.nn.functional.pad(left, pad).flatten() for left, pad in zip(lefts, padded, strict=True)]
    return torch.cat(below), torch.cat(beside), [len(right) for right in below]


@triton.jit
def _place(table):
    """This program's row: first output column, end of the matrix's columns, width, first input column, first element."""
    at = table + tl.program_id(0) * 5
    first, end, width = tl.load(at).to(tl.int32), tl.load(at + 1).to(tl.int32), tl.load(at + 2).to(tl.int32)
    return first, end, width, tl.load(at + 3), tl.load(at + 4)


@triton.jit
def _few_rows(
    x, matrix, table, bias, residual, y, M, x_stride, residual_stride, y_stride,
    ALIGN: tl.constexpr, STAGES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    first, end, width, source, element = _place(table)
    width, source, element = tl.multiple_of(width, ALIGN), tl.multiple_of(source, ALIGN), tl.multiple_of(element, ALIGN)
    m, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    inside = first + n < end
    at_x = x + source + m[:, None] * x_stride + k[None, :]
    at = matrix + element + n.to(tl.int64)[:, None] * width + k[None, :]
    total = tl.zeros((BM, BN, BK), tl.float32)
    for start in tl.range(0, width, BK, num_stages=STAGES):
        within = start + k < width
        weight = tl.load(at + start, mask=inside[:, None] & within[None, :], other=0.0).to(tl.float32)
        given = tl.load(at_x + start, mask=(m < M)[:, None] & within[None, :], other=0.0).to(tl.float32)
        total += given[:, None, :] * weight[None, :, :]
    sums = tl.sum(total, axis=2)
    here = (m < M)[:, None] & inside[None, :]
    column = (first + n)[None, :]
    if bias is not None:
        sums += tl.load(bias + first + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        sums += tl.load(residual + m[:, None] * residual_stride + column, mask=here, other=0.0).to(tl.float32)
    tl.store(y + m[:, None] * y_stride + column, sums.to(y.dtype.element_ty), mask=here)


@triton.jit
def _many_rows(
    x, matrix, table, bias, residual, y, M, x_stride, residual_stride, y_stride,
    ALIGN: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    first, end, width, source, element = _place(table)
    width, source, element = tl.multiple_of(width, ALIGN), tl.multiple_of(source, ALIGN), tl.multiple_of(element, ALIGN)
    m, n, k = (tl.program_id(1) * BM + tl.arange(0, BM)).to(tl.int64), tl.arange(0, BN), tl.arange(0, BK)
    inside = first + n < end
    at_x = x + source + m[:, None] * x_stride + k[None, :]
    at = matrix + element + n.to(tl.int64)[:, None] * width + k[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(0, width, BK, num_stages=STAGES):
        within = start + k < width
        given = tl.load(at_x + start, mask=(m < M)[:, None] & within[None, :], other=0.0)
        weight = tl.load(at + start, mask=inside[:, None] & within[None, :], other=0.0)
        if WIDE:  # the interpreter multiplies bfloat16 wrongly
            given, weight = given.to(tl.float32), weight.to(tl.float32)
        total = tl.dot(given, tl.trans(weight), total, input_precision="ieee")
    here = (m < M)[:, None] & inside[None, :]
    column = (first + n)[None, :]
    if bias is not None:
        total += tl.load(bias + first + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        total += tl.load(residual + m[:, None] * residual_stride + column, mask=here, other=0.0).to(tl.float32)
    tl.store(y + m[:, None] * y_stride + column, total.to(y.dtype.element_ty), mask=here)


def _table(outs: Sequence[int], widths: Sequence[int], reads: bool, columns: int, device: torch.device) -> Tensor:
    """One row for each program, see `_place`; `reads`: each matrix reads columns of its own, one behind the other."""
    key = (*outs, -1, *widths, reads, columns, device)
    if key not in _TABLE:
        ends = list(accumulate(outs))
        sources = list(accumulate(widths, initial=0)) if reads else [0] * len(widths)
        elements = list(accumulate((out * width for out, width in zip(outs, widths, strict=True)), initial=0))
        lines = [
            (end - out + start, end, width, source, element + start * width)
            for end, out, width, source, element in zip(ends, outs, widths, sources, elements, strict=False)
            for start in range(0, out, columns)
        ]
        _TABLE[key] = torch.tensor(lines, dtype=torch.int64).view(-1, 5).to(device)
    return _TABLE[key]


def tiles(count: int, outputs: int, width: int) -> dict[str, int]:
    """Sizes of a program's tile, its warps and its stages for `count` rows of input; estimates, as `UP_TO` is."""
    if count <= FEW:
        lines = 8 if outputs >= 2048 else 4 if outputs >= 512 else 1
        return {"BM": power_of_two(count), "BN": lines if count < FEW else min(lines, 4),
                "BK": min(512, max(32, power_of_two(width))), "STAGES": 3, "num_warps": 4}  # fmt: skip
    if count <= 64:
        return {"BM": max(16, power_of_two(count)), "BN": 32, "BK": 128, "STAGES": 4, "num_warps": 4}
    return {"BM": 128, "BN": 128, "BK": 64, "STAGES": 3, "num_warps": 8}


def _launch(
    x: Tensor, matrix: Tensor, outs: Sequence[int], widths: Sequence[int], reads: bool, added: Sequence[Tensor | None]
) -> Tensor:
    count, outputs = len(x), sum(outs)
    y = torch.empty(count, outputs, dtype=x.dtype, device=x.device)
    bias, residual = added
    sizes = tiles(count, outputs, max(widths, default=1))
    if x.dtype == torch.float32 and count > FEW:
        sizes |= {"BM": min(sizes["BM"], 64), "BN": 32, "BK": 32}
    table = _table(outs, widths, reads, sizes["BN"], x.device)
    if not y.numel():
        return y
    strides = (x.stride(0), 0 if residual is None else residual.stride(0), y.stride(0))
    given = (x, matrix, table, bias, residual, y, count, *strides)
    align = alignment(*widths)
    if count <= FEW:
        _few_rows[len(table),](*given, ALIGN=align, **sizes)
    else:
        _many_rows[len(table), triton.cdiv(count, sizes["BM"])](*given, ALIGN=align, WIDE=INTERPRETED, **sizes)
    return y


def _fake(
    x: Tensor, right: Tensor, left: Tensor, ranks: list[int], outs: list[int], bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    return x.new_empty(*x.shape[:-1], sum(outs))


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """`x matrixᵀ` for x (rows, in) and a contiguous matrix (out, in)."""
    return _launch(x, matrix, [len(matrix)], [x.shape[-1]], False, (None, None))


@operator("grouped_low_rank", _fake)
def grouped_low_rank(
    x: Tensor, right: Tensor, left: Tensor, ranks: list[int], outs: list[int], bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """Multiply by all low-rank matrices of a group; `why_not` says where it cannot.

    Args:
        x: (..., in).
        right: (Σ rank, in), the right factors one below the other.
        left: (Σ out · rank,), the left factors row by row, one behind the other.
        ranks, outs: of the members.
        bias: (Σ out,) or None.
        residual: (..., Σ out) or None, added to the result.

    Returns:
        (..., Σ out) in the dtype of x, the members' outputs beside each other.
    """
    flat = rows_of(x)
    z = product(flat, right.contiguous())
    added = (bias, None if residual is None else rows_of(residual))
    return _launch(z, left.contiguous(), outs, ranks, True, added).view(*x.shape[:-1], sum(outs))


def rows_of(x: Tensor) -> Tensor:
    """(..., n) as (rows, n) whose values lie one behind the other; a copy only where they do not."""
    flat = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(x.shape[:-1].numel(), x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()
