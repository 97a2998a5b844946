"""Reading trellis codes back, compiled for the CPU by numba where it is installed: many times as fast as by torch's operations.

The values are computed as torch computes them, so that both ways give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....cuda.dispatch import why_not
from ..cpu.threads import has_numba, in_threads
from .code import SIDE, TILE, Code
from .lanes import decode_tile
from .tables import trellis_unit

_ALONE = 1 << 18  # values that one thread reads in less time than another one needs to begin


def can_read(code: Code, codes: Tensor) -> bool:
    """Whether the compiled way reads these codes: a trellis on the CPU with numba at hand."""
    return not why_not_compiled(code, codes) and codes.device.type == "cpu" and not torch.compiler.is_compiling()


def why_not_compiled(code: Code, codes: Tensor) -> str:
    """Why these codes have no compiled product, on the CPU by numba or on a GPU by Triton; empty where they have one."""
    if code.kind != "trellis":
        return f"only a trellis is decoded by compiled code, and this is {code.kind}"
    if codes.device.type == "cpu":
        return "" if has_numba() else "numba is not installed (pip install 'lrc[compiled]')"
    return why_not(codes.new_empty(0, dtype=torch.float32), codes)


def read_trellis(code: Code, codes: Tensor) -> Tensor:
    """The float32 matrix of codes (rows of tiles, columns of tiles, bytes) uint8; a view of its transposed."""
    rows, columns, _ = codes.shape
    found = torch.empty(columns * SIDE, rows * SIDE)
    words, read = words_of(codes), _reader(code.bits, code.state_bits)
    unit, into = np.float32(trellis_unit(code.state_bits)), found.numpy()
    in_threads(rows, lambda first, last: read(words, columns, unit, first, last, into), least=_least_rows(columns))
    return found.T


def words_of(codes: Tensor) -> Any:
    """Codes (rows of tiles, columns of tiles, bytes) uint8 as an array of words of 16 bits."""
    return codes.contiguous().view(-1).numpy().view(np.uint16)


def _least_rows(columns: int) -> int:
    return max(1, _ALONE // (TILE * columns))


@cache
def _reader(bits: int, state_bits: int) -> Callable[..., None]:
    """A function of words, columns of tiles, unit, the first and the last row of tiles, and the (in, out) matrix to fill."""
    numba: Any = import_module("numba")
    decode = decode_tile(bits, state_bits)

    @numba.njit(nogil=True)
    def read(words: Any, columns: Any, unit: Any, first: Any, last: Any, into: Any) -> None:
        flat, width = into.reshape(-1), into.shape[1]
        for row in range(first, last):
            for column in range(columns):
                place = column * SIDE * width + row * SIDE
                decode(words, (row * columns + column) * SIDE * bits, unit, flat, place, width)

    return read
