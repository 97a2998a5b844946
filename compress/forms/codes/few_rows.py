"""The product of a few rows of input with a trellis' codes, compiled for the CPU by numba, with the rotations before and after.

By torch's operations the two rotations of one row are some thirty small calls, which take longer than the product itself, and
the matrix is written to memory before it is multiplied. Here sixteen values are decoded into registers and used for every row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cpu.threads import in_threads
from .code import SIDE, TILE, Code
from .lanes import add_products, decode_tile
from .reading import can_read, words_of
from .rotation import WIDEST, hadamard, hartley, odd_factor, signs
from .tables import trellis_unit

MOST = 16  # rows of input; with more of them a matrix that is read once is multiplied faster
_ALONE = 1 << 19  # values times rows that one thread multiplies in less time than another one needs to begin
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CPU = torch.device("cpu")


def can_multiply(code: Code, codes: Tensor, x: Tensor, shape: tuple[int, int], rotated: bool) -> bool:
    """Whether the compiled way multiplies this input by these codes.

    Args:
        code, codes: of the matrix.
        x: (..., in).
        shape: (out, in).
        rotated: whether the matrix is.
    """
    rows = x.numel() // shape[1]
    return (
        0 < rows <= MOST
        and x.dtype in _DTYPES
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not (rotated and max(map(odd_factor, shape)) > WIDEST)
        and can_read(code, codes)
    )


def product_of_few(code: Code, codes: Tensor, x: Tensor, scales: Tensor, seed: int | None, out_features: int) -> Tensor:
    """`Q_outᵀ (codes · scales · (Q_in x))` in float32, computed in it.

    Args:
        codes: (rows of tiles, columns of tiles, bytes) uint8.
        x: (rows, in), not more than `MOST` rows.
        scales: (columns of tiles,), one for 16 columns.
        seed: of the rotations; None: there are none.
        out_features: rows of the matrix without those that fill the last tile.
    """
    tall, wide, _ = codes.shape
    count, in_features = x.shape
    inner = np.zeros((count, wide * SIDE), np.float32)
    inner[:, :in_features] = x.float().numpy()
    turn = _rotation()
    if seed is not None:
        turn(inner, in_features, *_parts(in_features, seed), True)
    inner *= np.repeat(scales.float().numpy(), SIDE)
    y = np.empty((count, tall * SIDE), np.float32)
    words, multiply = words_of(codes), _multiplication(code.bits, code.state_bits)
    unit = np.float32(trellis_unit(code.state_bits))
    least = max(1, _ALONE // (TILE * wide * count))
    in_threads(tall, lambda first, last: multiply(words, wide, unit, inner, first, last, y), least=least)
    if seed is not None:
        turn(y, out_features, *_parts(out_features, seed + 1), False)
    return torch.from_numpy(y)[:, :out_features]


@lru_cache(maxsize=4096)
def _parts(size: int, seed: int) -> tuple[Any, Any]:
    """The signs (size,) of a rotation; the matrix of the odd factor, with as much of the power of two as fills a register."""
    odd = odd_factor(size)
    filled = 1
    while filled * odd < SIDE and size % (2 * filled * odd) == 0:
        filled *= 2
    mixing = torch.kron(hadamard(filled, _CPU, torch.float32), hartley(odd, _CPU, torch.float32))
    # the rest of the power of two is added and subtracted without its factor, which the signs have
    signed = signs(size, seed, _CPU, torch.float32) * (filled * odd / size) ** 0.5
    return signed.numpy(), mixing.contiguous().numpy()


@cache
def _multiplication(bits: int, state_bits: int) -> Callable[..., None]:
    """A function of words, columns of tiles, unit, inputs (rows, in), the first and last row of tiles, outputs (rows, out)."""
    numba: Any = import_module("numba")
    decode, add = decode_tile(bits, state_bits), add_products()

    @numba.njit(nogil=True)
    def multiply(words: Any, columns: Any, unit: Any, inputs: Any, first: Any, last: Any, outputs: Any) -> None:
        count, width = inputs.shape
        values, sums, flat = np.empty(TILE, np.float32), np.empty(count * SIDE, np.float32), inputs.reshape(-1)
        for row in range(first, last):
            sums[:] = 0
            for column in range(columns):
                decode(words, (row * columns + column) * SIDE * bits, unit, values, 0, SIDE)
                for line in range(count):
                    add(values, flat, line * width + column * SIDE, sums, line * SIDE)
            for line in range(count):
                outputs[line, row * SIDE : (row + 1) * SIDE] = sums[line * SIDE : (line + 1) * SIDE]

    return multiply


@cache
def _rotation() -> Callable[..., None]:
    """A function that rotates the first `size` numbers of each row in place, forwards (signs first) or back (signs last)."""
    numba: Any = import_module("numba")

    @numba.njit(nogil=True, fastmath=True)
    def turn(x: Any, size: Any, signed: Any, mixing: Any, forwards: Any) -> None:
        width = len(mixing)
        part = np.empty(width, np.float32)
        for line in range(len(x)):
            row = x[line, :size]
            if forwards:
                row *= signed
            half = width
            while half < size:
                for start in range(0, size, 2 * half):
                    low, high = row[start : start + half], row[start + half : start + 2 * half]
                    for at in range(half):
                        first, second = low[at], high[at]
                        low[at], high[at] = first + second, first - second
                half *= 2
            if width > 1:
                for start in range(0, size, width):
                    near = row[start : start + width]
                    part[:] = near
                    near[:] = 0
                    for before in range(width):
                        value, mixed = part[before], mixing[before]
                        for after in range(width):
                            near[after] += value * mixed[after]
            if not forwards:
                row *= signed

    return turn
