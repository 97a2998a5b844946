"""Reading trellis codes back, compiled for the CPU by numba where it is installed: ten times as fast as by torch's operations.

The values are copied out of the table as they are, so that both ways give the same bits in every dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cpu.threads import has_numba, in_threads
from .code import SIDE, TILE, Code
from .tables import trellis_values

_WORDS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_ALONE = 1 << 16  # values that one thread reads in less time than another one needs to begin


def available(code: Code, codes: Tensor, dtype: torch.dtype) -> bool:
    """Whether the compiled way reads these codes: a trellis on the CPU, in a dtype of 16 or 32 bits, with numba at hand."""
    if code.kind != "trellis" or codes.device.type != "cpu" or dtype not in _WORDS or torch.compiler.is_compiling():
        return False
    return has_numba()


def read_trellis(code: Code, codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix in `dtype` of codes (rows of tiles, columns of tiles, bytes) uint8; a tile has 16 rows and columns."""
    rows, columns, _ = codes.shape
    found = torch.empty(rows * SIDE, columns * SIDE, dtype=dtype)
    packed, words, table = codes.contiguous().numpy(), found.view(_WORDS[dtype]).numpy(), _table(code.state_bits, dtype)
    read = _reader(code.bits)
    in_threads(rows, lambda first, last: read(packed, table, first, last, words), least=max(1, _ALONE // (TILE * columns)))
    return found


@lru_cache(maxsize=16)
def _table(state_bits: int, dtype: torch.dtype) -> Any:
    return trellis_values(state_bits, torch.device("cpu")).to(dtype).view(_WORDS[dtype]).numpy()


@cache
def _reader(bits: int) -> Callable[..., None]:
    """A function of packed (rows, columns, bytes), table, the first and last row of tiles, and the words to fill."""
    numba: Any = import_module("numba")
    together = (
        bits + 2
    )  # bytes in which eight values have their states: `bits` of new bits, and up to 16 of the last one's memory

    @numba.njit(nogil=True)
    def read(packed: Any, table: Any, first: Any, last: Any, words: Any) -> None:
        mask, length = numba.uint64(len(table) - 1), packed.shape[2]
        ring = np.empty(length + 2, np.uint8)
        for row in range(first, last):
            for column in range(packed.shape[1]):
                ring[:length] = packed[row, column]
                ring[length:] = ring[:2]
                for group in range(TILE // 8):  # from the end of the tile, whose last value's window starts at the first bit
                    window = numba.uint64(0)
                    for byte in range(together):
                        window |= numba.uint64(ring[group * bits + byte]) << numba.uint64(8 * byte)
                    for place in range(8):
                        state = (window >> numba.uint64(place * bits)) & mask
                        value = TILE - 1 - 8 * group - place
                        words[row * SIDE + (value >> 4), column * SIDE + (value & 15)] = table[state]

    return read
