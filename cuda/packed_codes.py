"""Product by packed codes with a low-rank correction: y = W x + left z + bias (+ residual), z = right x, W on a grid.

Codes stay as they are stored (compress/forms/grids.py): rows of codes of 2, 3, 4, 5, 6 or 8 bits, least significant bit first,
each row padded to whole bytes. They are unpacked in registers. A word of a row holds a power of two of codes: a byte or, where
rows are whole 32-bit words, four bytes; with 3 bits three bytes hold 8 codes, with 5 bits five, with 6 bits three hold 4.

A code becomes a float without an integer conversion, which GPUs do slowly: a code c whose bits begin at bit b of a word, put
into the mantissa of 2^23, is 2^23 + c 2^b, and 2^-b times that minus 2^(23 - b) is c, exactly in float32, while b + bits is at
most 23. Words are therefore read in two halves. (Magic numbers as in Kim et al. 2022, "Who says elephants can't run", 4.2.)

* `_few_rows`, up to 4 rows of input: Σ step Σ (code - zero) x in float32, without tensor cores.
* `_many_rows`: code - zero is exact in the input's dtype and goes through tensor cores; the step multiplies the float32 sum
  where one group covers a tile, else the value before the product.
* `codes_dense`: the matrix written out in one pass, for products of many rows.
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

from .dispatch import INTERPRETED, operator, power_of_two
from .dispatch import why_not as why_not_here
from .grouped_low_rank import product, rows_of

FEW = 4  # rows up to which no tensor cores are used
# bits -> (codes in a word, bytes of a word); for 2, 4 and 8 bits the word of one byte
_WORDS = {2: (4, 1), 3: (8, 3), 4: (2, 1), 5: (8, 5), 6: (4, 3), 8: (1, 1)}


class Codes(NamedTuple):
    """A matrix on a grid, as a checkpoint stores it.

    Args:
        packed: (out · bytes of a row,) uint8.
        steps: (out, groups) floating point, or uint8 exponents of powers of two (biased by 127).
        zeros: (out · bytes of a row of zeros,) uint8, packed as codes are; None: the middle code.
        bits: per code.
        group: inputs that share a step; the last group of a row may be shorter.
        inputs, outputs: of the matrix.
    """

    packed: Tensor
    steps: Tensor
    zeros: Tensor | None
    bits: int
    group: int
    inputs: int
    outputs: int


def why_not(x: Tensor, codes: Codes, right: Tensor | None = None, left: Tensor | None = None) -> str:
    """Why the kernel cannot take these tensors; empty where it can."""
    if codes.group < codes.inputs and codes.group % _WORDS[codes.bits][0]:
        return f"groups of {codes.group} inputs are not whole words of {_WORDS[codes.bits][0]} codes"
    if any(factor is not None and factor.dtype != x.dtype for factor in (right, left)):
        return "input and correction differ in dtype"
    return why_not_here(x, codes.packed, codes.steps, codes.zeros, right, left)


def dense_reference(codes: Codes, dtype: torch.dtype) -> Tensor:
    """The (out, in) matrix that the codes stand for, in `dtype`, by torch's operations."""

    def unpacked(packed: Tensor, count: int) -> Tensor:
        lines = torch.nn.functional.pad(packed.view(codes.outputs, -1), (0, 1)).int()
        bit = torch.arange(count, device=packed.device) * codes.bits
        pair = lines[:, bit // 8] | lines[:, (bit + codes.bits - 1) // 8] << 8
        inner = torch.where(bit // 8 == (bit + codes.bits - 1) // 8, pair & 255, pair)
        return (inner >> bit % 8) & (2**codes.bits - 1)

    steps = codes.steps.int().sub(127).double().exp2() if codes.steps.dtype == torch.uint8 else codes.steps.double()
    zeros = 2 ** (codes.bits - 1) if codes.zeros is None else unpacked(codes.zeros, steps.shape[1]).double()
    at = torch.arange(codes.inputs, device=steps.device) // codes.group
    zero = zeros[:, at] if isinstance(zeros, Tensor) else zeros
    return ((unpacked(codes.packed, codes.inputs).double() - zero) * steps[:, at]).to(dtype)


def reference(
    x: Tensor,
    codes: Codes,
    right: Tensor | None = None,
    left: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """What `codes_product` computes, by torch's operations."""
    y = torch.nn.functional.linear(x, dense_reference(codes, x.dtype), bias)
    if right is not None and left is not None:
        y = y + torch.nn.functional.linear(torch.nn.functional.linear(x, right), left)
    return y if residual is None else y + residual


@triton.jit
def _codes(
    packed, n, inside, word, row,
    BITS: tl.constexpr, PER: tl.constexpr, BYTES: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Codes (BN, BW, PER) float32 of words `word` (BW,) of the rows n (BN,) int64; `row`: words (or bytes) of a row."""
    if BYTES == 1 or BYTES == 4:
        here = inside[:, None] & (word < row)[None, :]
        words = tl.load(packed + n[:, None] * row + word[None, :], mask=here, other=0).to(tl.int32)
        high = words >> (BITS * PER // 2)
    else:
        wide = tl.zeros((BN, BW), tl.int64 if BYTES > 4 else tl.int32)
        for part in tl.static_range(BYTES):
            at = word * BYTES + part
            byte = tl.load(packed + n[:, None] * row + at[None, :], mask=inside[:, None] & (at < row)[None, :], other=0)
            wide |= byte.to(wide.dtype) << (8 * part)
        words = wide.to(tl.int32)
        high = (wide >> (BITS * PER // 2)).to(tl.int32)
    if PER == 1:
        return tl.reshape((words | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0, (BN, BW, 1))
    else:  # Triton compiles what follows a return in a branch too
        place = tl.arange(0, PER // 2) * BITS
        bits = tl.join(words, high)[:, :, :, None] & (((1 << BITS) - 1) << place)[None, None, None, :]
        scale = ((127 - place) << 23).to(tl.float32, bitcast=True)  # 2^-place
        floats = (bits | 0x4B000000).to(tl.float32, bitcast=True) * scale - 8388608.0 * scale
        return tl.reshape(floats, (BN, BW, PER))


@triton.jit
def _steps(
    steps, zeros, n, inside, group, within, groups, zero_row,
    BITS: tl.constexpr, EXPONENTS: tl.constexpr,
):  # fmt: skip
    """Steps and zeros, float32, of the groups `group` (…,) of rows n (BN,) int64, as (BN, …)."""
    here = inside[:, None] & within[None, :]
    step = tl.load(steps + n[:, None] * groups + group[None, :], mask=here, other=0)
    if EXPONENTS:
        step = (step.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    zero = tl.full(step.shape, 1 << (BITS - 1), tl.float32)
    if zeros is not None:
        bit = group * BITS
        byte = bit // 8
        at = zeros + n[:, None] * zero_row + byte[None, :]
        pair = tl.load(at, mask=here, other=0).to(tl.int32)
        if 8 % BITS != 0:
            more = here & (byte + 1 < zero_row)[None, :]
            pair |= tl.load(at + 1, mask=more, other=0).to(tl.int32) << 8
        zero = ((pair >> (bit % 8)[None, :]) & ((1 << BITS) - 1)).to(tl.float32)
    return step.to(tl.float32), zero


@triton.jit
def _few_rows(
    x, packed, steps, zeros, z, left, bias, residual, y, M, N, K, row, groups, zero_row, group, rank,
    x_stride, residual_stride,
    BITS: tl.constexpr, PER: tl.constexpr, BYTES: tl.constexpr, EXPONENTS: tl.constexpr, STAGES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    m, n = tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    lines, inside, w, k = n.to(tl.int64), n < N, tl.arange(0, BW), tl.arange(0, BW * PER)
    total = tl.zeros((BM, BN, BW), tl.float32)
    for start in tl.range(0, K, BW * PER, num_stages=STAGES):
        word = start // PER + w
        code = _codes(packed, lines, inside, word, row, BITS, PER, BYTES, BN, BW)
        step, zero = _steps(steps, zeros, lines, inside, word * PER // group, word * PER < K, groups, zero_row, BITS, EXPONENTS)
        at = x + m[:, None] * x_stride + start + k[None, :]
        given = tl.load(at, mask=(m < M)[:, None] & (start + k < K)[None, :], other=0.0).to(tl.float32)
        given = tl.reshape(given, (BM, BW, PER))
        sums = tl.sum(given[:, None, :, :] * code[None, :, :, :], axis=3)
        total += (sums - zero[None, :, :] * tl.sum(given, axis=2)[:, None, :]) * step[None, :, :]
    sums = tl.sum(total, axis=2)
    if left is not None:
        r = tl.arange(0, BR)
        for start in range(0, rank, BR):
            within = start + r < rank
            factor = tl.load(
                left + lines[:, None] * rank + start + r[None, :], mask=inside[:, None] & within[None, :], other=0.0
            )
            part = tl.load(z + m[:, None] * rank + start + r[None, :], mask=(m < M)[:, None] & within[None, :], other=0.0)
            sums += tl.sum(part.to(tl.float32)[:, None, :] * factor.to(tl.float32)[None, :, :], axis=2)
    here = (m < M)[:, None] & inside[None, :]
    if bias is not None:
        sums += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        sums += tl.load(residual + m[:, None] * residual_stride + n[None, :], mask=here, other=0.0).to(tl.float32)
    tl.store(y + m[:, None] * N + n[None, :], sums.to(y.dtype.element_ty), mask=here)


@triton.jit
def _many_rows(
    x, packed, steps, zeros, z, left, bias, residual, y, M, N, K, row, groups, zero_row, group, rank,
    x_stride, residual_stride,
    BITS: tl.constexpr, PER: tl.constexpr, BYTES: tl.constexpr, EXPONENTS: tl.constexpr, STAGES: tl.constexpr,
    ONE_GROUP: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    m, n = (tl.program_id(1) * BM + tl.arange(0, BM)).to(tl.int64), tl.program_id(0) * BN + tl.arange(0, BN)
    lines, inside, w, k = n.to(tl.int64), n < N, tl.arange(0, BW), tl.arange(0, BW * PER)
    total = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(0, K, BW * PER, num_stages=STAGES):
        word = start // PER + w
        code = _codes(packed, lines, inside, word, row, BITS, PER, BYTES, BN, BW)
        if ONE_GROUP:
            one = start // group + tl.arange(0, 1)
            step, zero = _steps(steps, zeros, lines, inside, one, one < groups, groups, zero_row, BITS, EXPONENTS)
            weight = code - zero[:, :, None]
        else:
            step, zero = _steps(
                steps, zeros, lines, inside, word * PER // group, word * PER < K, groups, zero_row, BITS, EXPONENTS
            )
            weight = (code - zero[:, :, None]) * step[:, :, None]
        weight = tl.reshape(weight, (BN, BW * PER)).to(x.dtype.element_ty)
        given = tl.load(
            x + m[:, None] * x_stride + start + k[None, :], mask=(m < M)[:, None] & (start + k < K)[None, :], other=0.0
        )
        if WIDE:  # the interpreter multiplies bfloat16 wrongly
            given, weight = given.to(tl.float32), weight.to(tl.float32)
        if ONE_GROUP:
            total += tl.dot(given, tl.trans(weight), input_precision="ieee") * tl.trans(step)
        else:
            total = tl.dot(given, tl.trans(weight), total, input_precision="ieee")
    if left is not None:
        r = tl.arange(0, BR)
        for start in range(0, rank, BR):
            within = start + r < rank
            factor = tl.load(
                left + lines[:, None] * rank + start + r[None, :], mask=inside[:, None] & within[None, :], other=0.0
            )
            part = tl.load(z + m[:, None] * rank + start + r[None, :], mask=(m < M)[:, None] & within[None, :], other=0.0)
            if WIDE:
                factor, part = factor.to(tl.float32), part.to(tl.float32)
            total = tl.dot(part, tl.trans(factor), total, input_precision="ieee")
    here = (m < M)[:, None] & inside[None, :]
    if bias is not None:
        total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        total += tl.load(residual + m[:, None] * residual_stride + n[None, :], mask=here, other=0.0).to(tl.float32)
    tl.store(y + m[:, None] * N + n[None, :], total.to(y.dtype.element_ty), mask=here)


@triton.jit
def _dense(
    packed, steps, zeros, y, N, K, row, groups, zero_row, group,
    BITS: tl.constexpr, PER: tl.constexpr, BYTES: tl.constexpr, EXPONENTS: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    n, word = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BW + tl.arange(0, BW)
    lines, inside = n.to(tl.int64), n < N
    code = _codes(packed, lines, inside, word, row, BITS, PER, BYTES, BN, BW)
    step, zero = _steps(steps, zeros, lines, inside, word * PER // group, word * PER < K, groups, zero_row, BITS, EXPONENTS)
    weight = tl.reshape((code - zero[:, :, None]) * step[:, :, None], (BN, BW * PER))
    k = tl.program_id(1) * BW * PER + tl.arange(0, BW * PER)
    tl.store(y + lines[:, None] * K + k[None, :], weight.to(y.dtype.element_ty), mask=inside[:, None] & (k < K)[None, :])


def _words(codes: Codes) -> tuple[Tensor, int, dict[str, int]]:
    """The packed tensor as words, the number of words (or bytes) of a row, and the sizes of a word."""
    row = -(-codes.inputs * codes.bits // 8)
    per, size = _WORDS[codes.bits]
    packed = codes.packed
    whole = size == 1 and row % 4 == 0 and packed.data_ptr() % 4 == 0
    if whole and (codes.group >= codes.inputs or codes.group % (4 * per) == 0):
        packed, row, per, size = packed.view(torch.int32), row // 4, 4 * per, 4
    return packed, row, {"BITS": codes.bits, "PER": per, "BYTES": size, "EXPONENTS": codes.steps.dtype == torch.uint8}


def tiles(count: int, codes: Codes, per: int, dtype: torch.dtype) -> dict[str, int]:
    """Sizes of a program's tile, its warps and its stages for `count` rows of input; estimates, as `UP_TO` is."""
    if count <= FEW:  # a thread holds 32 codes; with four times as many ptxas spills registers
        words = max(1, min(64 if count == 1 else 32, power_of_two(-(-codes.inputs // per))))
        lines = 8 if codes.outputs >= 2048 else 4
        return {"BM": power_of_two(count), "BN": lines, "BW": words, "BR": 32, "STAGES": 3, "num_warps": 4}
    one = codes.group >= codes.inputs or codes.group % 64 == 0
    wide = 64 if dtype == torch.float32 or (one and codes.group % 128 and codes.group < codes.inputs) else 128
    across, warps = (32, 4) if count <= 32 else (64, 8)
    rows, words = min(64, max(16, power_of_two(count))), max(1, wide // per)
    return {"ONE_GROUP": int(one), "BM": rows, "BN": across, "BW": words, "BR": 32, "STAGES": 3, "num_warps": warps}


def _fake(
    x: Tensor, packed: Tensor, steps: Tensor, zeros: Tensor | None, sizes: list[int],
    right: Tensor | None, left: Tensor | None, bias: Tensor | None, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], sizes[3])


@operator("codes_product", _fake)
def _product(
    x: Tensor, packed: Tensor, steps: Tensor, zeros: Tensor | None, sizes: list[int],
    right: Tensor | None, left: Tensor | None, bias: Tensor | None, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    codes = Codes(packed, steps, zeros, *sizes)
    flat = rows_of(x)
    count = len(flat)
    y = torch.empty(count, codes.outputs, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y.view(*x.shape[:-1], codes.outputs)
    z, rank = None, 0
    if right is not None and left is not None and len(right):
        z, rank, left = product(flat, right.contiguous()), len(right), left.contiguous()
    words, row, kind = _words(codes)
    added = None if residual is None else rows_of(residual)
    zero_row = 0 if zeros is None else -(-steps.shape[1] * codes.bits // 8)
    given = (flat, words, steps, zeros, z, left if rank else None, bias, added, y, count, codes.outputs, codes.inputs, row,
             steps.shape[1], zero_row, codes.group, rank, flat.stride(0), 0 if added is None else added.stride(0))  # fmt: skip
    size = tiles(count, codes, kind["PER"], x.dtype)
    across = triton.cdiv(codes.outputs, size["BN"])
    if count <= FEW:
        _few_rows[across,](*given, **kind, **size)
    else:
        _many_rows[across, triton.cdiv(count, size["BM"])](*given, **kind, WIDE=INTERPRETED, **size)
    return y.view(*x.shape[:-1], codes.outputs)


def codes_product(
    x: Tensor,
    codes: Codes,
    right: Tensor | None = None,
    left: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Multiply by a matrix of packed codes and its low-rank correction; `why_not` says where it cannot.

    Args:
        x: (..., in).
        codes: of the (out, in) matrix.
        right, left: (rank, in) and (out, rank), or both None.
        bias: (out,) or None.
        residual: (..., out) or None, added to the result.

    Returns:
        (..., out) in the dtype of x.
    """
    return _product(x, *codes[:3], list(codes[3:]), right, left, bias, residual)


def _fake_dense(packed: Tensor, steps: Tensor, zeros: Tensor | None, sizes: list[int], dtype: torch.dtype) -> Tensor:
    return packed.new_empty(sizes[3], sizes[2], dtype=dtype)


@operator("codes_dense", _fake_dense)
def _write_dense(packed: Tensor, steps: Tensor, zeros: Tensor | None, sizes: list[int], dtype: torch.dtype) -> Tensor:
    codes = Codes(packed, steps, zeros, *sizes)
    y = torch.empty(codes.outputs, codes.inputs, dtype=dtype, device=packed.device)
    words, row, kind = _words(codes)
    zero_row = 0 if zeros is None else -(-steps.shape[1] * codes.bits // 8)
    lines, wide = 16, max(1, 256 // kind["PER"])
    grid = (triton.cdiv(codes.outputs, lines), triton.cdiv(codes.inputs, wide * kind["PER"]))
    given = (words, steps, zeros, y, codes.outputs, codes.inputs, row, steps.shape[1], zero_row, codes.group)
    _dense[grid](*given, **kind, BN=lines, BW=wide, num_warps=4)
    return y


def codes_dense(codes: Codes, dtype: torch.dtype) -> Tensor:
    """The (out, in) matrix that the codes stand for, computed in float32 and rounded to `dtype`, written in one pass."""
    return _write_dense(*codes[:3], list(codes[3:]), dtype)
