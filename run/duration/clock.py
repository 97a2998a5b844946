"""Timing probes: each size is measured, and the next one only while it is expected to stay within a budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

Clock = Callable[[], float]
Size = TypeVar("Size")
wall: Clock = time.perf_counter
_GROWTH = (4.0, 8.0)  # bounds of how much longer the next size may take
_SHORT = 0.5  # of the budget


@dataclass(frozen=True)
class Stopwatch:
    """Measures seconds of a function.

    Args:
        clock: seconds; of the wall, or of the processor where other processes take turns.
        device: of the computation, which is waited for.
        budget: seconds that one measurement may be expected to take; the first size is measured in any case.
    """

    clock: Clock = wall
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - a constant
    budget: float = 1.0

    def seconds(self, function: Callable[[], object]) -> float:
        """How long a call takes."""
        self._settle()
        started = self.clock()
        function()
        self._settle()
        return self.clock() - started

    def rising(self, sizes: Sequence[Size], function: Callable[[Size], object]) -> list[float]:
        """Seconds for the first sizes, as many as the budget allows.

        The first call of a size is slower than later ones: libraries choose how to compute it, and memory is new. Where it is
        short it is called again.

        Args:
            sizes: from the smallest on, each some two to four times as large as the one before it.
            function: computes a size.
        """
        found: list[float] = []
        for size in sizes:
            if found and found[-1] * self._growth(found) > self.budget:
                break
            seconds = self.seconds(partial(function, size))
            found.append(self.seconds(partial(function, size)) if seconds < _SHORT * self.budget else seconds)
        return found

    @staticmethod
    def _growth(found: Sequence[float]) -> float:
        """How many times as long the next size may take: twice as many as the last one did, within `_GROWTH`."""
        observed = found[-1] / found[-2] if len(found) > 1 and found[-2] > 0 else 0.0
        return min(_GROWTH[1], max(_GROWTH[0], 2 * observed))

    def _settle(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
