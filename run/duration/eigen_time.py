"""What eigenproblems take beyond the cube of their width: they read their matrix once for every column.

A matrix of some thousand columns does not fit into the processor's cache, and the narrow one that is measured for it does.
Half of the operations of the tridiagonal form are products of a triangle with a vector (Golub and Van Loan, Matrix
Computations, §8.3.1), which take as long as reading the triangle: 4/3 n³ bytes in all, in float64.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .clock import Stopwatch

_LARGEST = 1 << 26  # numbers of the matrix whose reading is measured, at most


class Eigenproblems(TorchFunctionMode):
    """Collects the widths of the eigenproblems that are solved on the CPU while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.widths: list[int] = []

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function is torch.linalg.eigh and args[0].device.type == "cpu":
            self.widths.append(args[0].shape[-1])
        return function(*args, **(kwargs or {}))


def beyond_the_cube(widths: Sequence[int], share: float, watch: Stopwatch) -> float:
    """Seconds that the eigenproblems take at full width on top of what the cube of their width says.

    Args:
        widths: of those that were measured.
        share: the fraction of the full width that they have.
        watch: measures how fast a matrix of either width is read.
    """
    extra = 0.0
    for width, count in Counter(widths).items() if share < 1 else ():
        full = round(width / share)
        slower = _seconds_a_byte(full, watch) - _seconds_a_byte(width, watch)
        extra += count * 4 / 3 * full**3 * max(0.0, slower)
    return extra


def _seconds_a_byte(width: int, watch: Stopwatch) -> float:
    rows = max(1, min(width, _LARGEST // width))
    matrix, vector = torch.ones(rows, width, dtype=torch.float64), torch.ones(width, dtype=torch.float64)
    (seconds,) = watch.rising([matrix], partial(torch.mv, vec=vector))
    return seconds / (8 * rows * width)
