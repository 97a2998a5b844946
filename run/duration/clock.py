"""Timing probes: each size is measured, and the next one only while it is expected to stay within a budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TypeVar

import torch

Clock = Callable[[], float]
Size = TypeVar("Size")
wall: Clock = time.perf_counter
_FIRST_GROWTH = 4.0  # how many times as long as the first size the second one may take
_GROWTH = 8.0  # the next size may take this many times more than the last one took more than the one before it
_SHORT = 0.5  # of the budget, for all calls of a size
_COMPILING = 8.0  # times the budget: a first call that takes longer is not repeated
_CALLS = 5  # of a size, at most


def typical(seconds: Sequence[float]) -> float:
    """The median of calls, without the first one: libraries choose in it how to compute, and its memory is new."""
    return median(seconds[1:] or seconds)


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

    def rising(
        self, sizes: Sequence[Size], function: Callable[[Size], object], work: Sequence[float] | None = None
    ) -> list[float]:
        """Seconds for the first sizes, as many as the budget allows: of each size what `typical` says of its calls.

        A short size is called several times, and its shortest call decides whether the next size fits the budget: where other
        processes hold the cores, threads wait for each other, so that a call of milliseconds takes a tenth of a second and a
        long one not much more than alone. The very first call may compile its functions: it is repeated unless it is long.

        Args:
            sizes: from the smallest on, each some two to four times as large as the one before it.
            function: computes a size.
            work: of each size, where time is a constant and a part in proportion to it. The first two sizes are then measured
                in any case, because one does not tell the parts apart. None: the next size may take much longer.
        """
        found: list[float] = []
        least: list[float] = []
        for size in sizes:
            if least and _next(least, work) > self.budget:
                break
            calls = [self.seconds(partial(function, size))]
            if not found and calls[0] < _COMPILING * self.budget:
                calls.append(self.seconds(partial(function, size)))
            while len(calls) < _CALLS and sum(calls) < _SHORT * self.budget:
                calls.append(self.seconds(partial(function, size)))
            found.append(typical(calls))
            least.append(min(calls))
        return found

    def _settle(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def _next(least: Sequence[float], work: Sequence[float] | None) -> float:
    """Seconds that the size after these may take."""
    if len(least) < 2:
        return _FIRST_GROWTH * least[-1] if work is None else 0.0
    more = max(0.0, least[-1] - least[-2])
    if work is None:
        return least[-1] + _GROWTH * more
    at = len(least)
    return least[-1] + more / (work[at - 1] - work[at - 2]) * (work[at] - work[at - 1])
