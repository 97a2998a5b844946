"""Decoding packed codes for a dense product, compiled by numba where it is installed: one pass instead of six by torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor


def decode_tiles(halves: Tensor, zeros: Tensor, steps: Tensor) -> Tensor:
    """The values (in, 64 · tiles) bfloat16 of packed codes, a transposed matrix: (code - zero) · step, rounded once.

    Args:
        halves: (planes, tiles, in, 32) uint8, two codes a byte; of two planes the first has the high halves of the codes.
        zeros: (tiles, groups, 64) float32, whole numbers.
        steps: (tiles, groups, 64) float32, each with eight significant bits, so that a product is exact before it is rounded.
    """
    planes, tiles, columns, half = halves.shape
    found = torch.empty(columns, tiles * 2 * half, dtype=torch.bfloat16)
    high, low = (halves[plane].contiguous().view(-1).numpy() for plane in (0, -1))
    groups = zeros.contiguous().view(-1).numpy(), steps.contiguous().view(-1).numpy(), columns // zeros.shape[1]
    words = found.view(torch.uint16).view(-1).numpy()
    _decoder(planes, 2 * half)(high, low, *groups, words, tiles)
    return found


@cache
def _decoder(planes: int, rows: int) -> Callable[..., None]:
    """A function of high and low bytes, zeros, steps, columns in a group, the words to fill, and the number of tiles."""
    numba: Any = import_module("numba")
    half = rows // 2

    # flat arrays and explicit 32-bit numbers are what the compiler makes vector instructions of
    @numba.njit(nogil=True, error_model="numpy")
    def decode(high: Any, low: Any, zeros: Any, steps: Any, width: Any, words: Any, tiles: Any) -> None:
        values = np.empty(rows, np.float32)
        bits = values.view(np.uint32)
        columns = len(words) // (tiles * rows)
        for at in range(tiles * columns):
            group = at // width * rows
            zero, step = zeros[group : group + rows], steps[group : group + rows]
            upper, lower = high[at * half : (at + 1) * half], low[at * half : (at + 1) * half]
            for j in range(half):
                one, other = np.int32(lower[j]) & np.int32(15), np.int32(lower[j]) >> np.int32(4)
                if planes == 2:
                    one |= (np.int32(upper[j]) & np.int32(15)) << np.int32(4)
                    other |= (np.int32(upper[j]) >> np.int32(4)) << np.int32(4)
                values[j] = (np.float32(one) - zero[j]) * step[j]
                values[half + j] = (np.float32(other) - zero[half + j]) * step[half + j]
            place = (at % columns * tiles + at // columns) * rows
            found = words[place : place + rows]
            for j in range(rows):  # to the nearest of 16 bits, ties to even
                odd = (bits[j] >> np.uint32(16)) & np.uint32(1)
                found[j] = np.uint16((bits[j] + np.uint32(0x7FFF) + odd) >> np.uint32(16))

    return decode
