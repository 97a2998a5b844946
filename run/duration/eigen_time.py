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


class ReadingTime:
    """How long a matrix takes to be read; each width is measured once.

    Args:
        watch: measures.
    """

    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch
        self._known: dict[int, float] = {}

    def beyond_the_cube(self, widths: Sequence[int], share: float) -> float:
        """Seconds that eigenproblems take at full width on top of what the cube of their width says.

        Args:
            widths: of those that were measured.
            share: the fraction of the full width that they have.
        """
        extra = 0.0
        for width, count in Counter(widths).items() if share < 1 else ():
            full = round(width / share)
            slower = self.seconds_a_byte(full) - self.seconds_a_byte(width)
            extra += count * 4 / 3 * full**3 * max(0.0, slower)
        return extra

    def seconds_a_byte(self, width: int) -> float:
        """Of a matrix with so many columns."""
        if width not in self._known:
            rows = max(1, min(width, _LARGEST // width))
            matrix, vector = torch.ones(rows, width, dtype=torch.float64), torch.ones(width, dtype=torch.float64)
            (seconds,) = self._watch.rising([matrix], partial(torch.mv, vec=vector))
            self._known[width] = seconds / (8 * rows * width)
        return self._known[width]
