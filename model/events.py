"""What a run tells whoever watches it: one event for each thing that it has done.

There is one shape of notification in lrc: a function that takes an `Event`. Steps that say more have a subclass of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """One thing that was done.

    Args:
        stage: what it was: "statistics", "losses", "refinement", or a sentence of its own.
        done: layers, rounds or looks that are finished; 0 where the stage is one thing.
        total: of how many.
        seconds: that this one took.
        loss: what a training step measured, in nats on held-out text; None where nothing was measured.
    """

    stage: str
    done: int = 0
    total: int = 0
    seconds: float = 0.0
    loss: float | None = None


Notify = Callable[[Event], None]


def silent(event: Event) -> None:
    """Tell nobody."""
