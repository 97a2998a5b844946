"""Progress notifications: a run sends one event for each step that it has finished.

Every notification in lrc is a call of a function that takes an `Event`. Steps that report more define a subclass of `Event`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """One finished step.

    Args:
        stage: the kind of step: "statistics", "losses", "refinement", or a short description.
        done: number of finished layers, rounds or evaluations; 0 if the stage has a single step, or has only begun.
        total: number of layers, rounds or evaluations of the stage; 0 if it has a single step.
        seconds: duration of this step.
        loss: held-out loss that a training step measured, in nats; None if it measured none.
    """

    stage: str
    done: int = 0
    total: int = 0
    seconds: float = 0.0
    loss: float | None = None


@dataclass(frozen=True)
class Noted(Event):
    """Something that the user should know: `stage` is a sentence."""


Notify = Callable[[Event], None]


def silent(event: Event) -> None:
    """Ignore the event."""
