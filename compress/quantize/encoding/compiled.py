"""Viterbi's algorithm compiled for the CPU by numba, where it is installed (`pip install lrc[compiled]`): ten times as fast.

The least costs of a tile's states stay in the cache, where an elementwise library writes them to memory six times a step.
Costs are the same in float32, so that only a tie between two sequences can fall differently from viterbi.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...forms.codes.code import Code
from ...forms.codes.tables import trellis_values
from ...forms.cpu.threads import has_numba, in_threads

_FORBIDDEN = 1e9


def available(code: Code, device: torch.device) -> bool:
    """Whether numba is installed and compiles this code's search: on the CPU, with states of twice the bits of a value."""
    return device.type == "cpu" and code.state_bits >= 2 * code.bits and has_numba()


def slow_without_numba() -> list[str]:
    """A remark where numba is missing; empty where it is there."""
    if has_numba():
        return []
    return ["numba is not installed: without it a CPU encodes a trellis ten times as slowly; pip install 'lrc[compiled]'"]


def viterbi_compiled(values: Tensor, code: Code, ring: Tensor | None = None) -> Tensor:
    """As `viterbi` of viterbi.py, in as many threads as torch has: the states (steps, tiles) int64 of values (steps, tiles)."""
    branches = 1 << code.bits
    # by the newest bits of a state, then by its others
    table = trellis_values(code.state_bits, values.device).view(-1, branches).T.contiguous().numpy()
    given = values.T.contiguous().numpy()
    states = np.empty(given.shape, np.int64)
    kept = np.full(len(given), -1, np.int64) if ring is None else ring.numpy()
    search = _search(code.bits)
    in_threads(len(given), lambda first, last: search(given[first:last], table, kept[first:last], states[first:last]))
    return torch.from_numpy(states).T


@cache
def _search(bits: int) -> Callable[..., None]:
    """A function of values (tiles, steps), table (branches, low), ring (tiles,) or -1, and states (tiles, steps) to fill."""
    numba: Any = import_module("numba")
    branches = 1 << bits  # a constant for the compiler, which unrolls the loops over it

    @numba.njit(nogil=True, fastmath=True)
    def step(x: Any, table: Any, least: Any, found: Any, oldest: Any) -> None:
        """The least cost by the bits that the next state keeps, and which oldest bits it came from."""
        count = len(least) // branches
        for newest in range(branches):
            values, chosen = table[newest], oldest[newest]
            for rest in range(count):
                difference = x - values[rest]
                best, number = least[rest] + difference * difference, np.int32(0)
                for old in range(1, branches):
                    difference = x - values[old * count + rest]
                    cost = least[old * count + rest] + difference * difference
                    less = cost < best
                    best = cost if less else best
                    number = np.int32(old) if less else number
                chosen[rest] = number
                found[newest * count + rest] = best

    @numba.njit(nogil=True, fastmath=True)
    def search(values: Any, table: Any, ring: Any, states: Any) -> None:
        """Every tile's steps forwards, then the way back."""
        tiles, steps = values.shape
        low = table.shape[1]
        count = low // branches
        least, found = np.empty(low, np.float32), np.empty(low, np.float32)
        oldest = np.empty((steps, branches, count), np.uint8)
        for tile in range(tiles):
            least[:] = 0.0 if ring[tile] < 0 else _FORBIDDEN
            if ring[tile] >= 0:
                least[ring[tile]] = 0.0
            for at in range(steps):
                step(values[tile, at], table, least, found, oldest[at])
                for rest in range(count):
                    for newest in range(branches):
                        least[rest * branches + newest] = found[newest * count + rest]
            kept = np.argmin(least) if ring[tile] < 0 else ring[tile]
            for at in range(steps - 1, -1, -1):
                state = oldest[at, kept & (branches - 1), kept >> bits] * low + kept
                states[tile, at] = state
                kept = state >> bits

    return search
