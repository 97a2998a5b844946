"""What is printed of the time that a run will take, and what would shorten it."""

from __future__ import annotations

import math
from typing import Any

import torch
from rich.console import Console

from ...plan.plan import Planned
from ...run.duration.foretell import Duration
from .console import plain_or_terminal

LONG = 4 * 3600.0  # seconds of a run from which on its plan says what would help
_SHOWN = 0.02  # of the whole; shorter parts are not listed
_ENOUGH = 4  # the fewest tokens for each dimension of the widest statistics that are proposed


def print_duration(duration: Duration | None, plan: Planned, console: Console | None = None) -> None:
    """Print how long a run takes, of what that is made, and for a long one what would help; None: that nothing was measured."""
    console = console or plain_or_terminal()
    if duration is None:
        console.print("time: not measured (--time measures this machine for some seconds; lrc compress does so by itself)")
        return
    shown = {name: seconds for name, seconds in duration.parts.items() if seconds >= _SHOWN * duration.seconds}
    parts = ", ".join(
        f"{name} {readable_time(seconds)}{' (roughly)' if name in duration.rough else ''}" for name, seconds in shown.items()
    )
    width = "" if duration.share == 1 else f", with matrices of 1/{1 / duration.share:.0f} of the width"
    console.print(
        f"time: about {readable_time(duration.seconds)} on this machine as busy as it is now: {parts} "
        f"(measured in {duration.took:.1f} s{width})"
    )
    for reason in duration.unknown:
        console.print(f"time: not in it, because it cannot be foretold: {reason}")
    if duration.seconds >= LONG:
        console.print(f"note: this is long. What would help: {'; '.join(_remedies(duration, plan))}")


def duration_json(duration: Duration) -> dict[str, Any]:
    """A prediction as data; seconds."""
    return {
        "seconds": duration.seconds, "parts": dict(duration.parts), "by_calibration_tokens": duration.by_text,
        "rough": list(duration.rough), "not_foretold": list(duration.unknown), "width_measured": duration.share,
    }  # fmt: skip


def readable_time(seconds: float) -> str:
    """A duration in the units that a person would use, with two digits that mean something."""
    if seconds < 1:
        return "under 1 s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours = minutes / 60
    return f"{hours:.1f} h" if hours < 36 else f"{hours / 24:.1f} days"


def _remedies(duration: Duration, plan: Planned) -> list[str]:
    calibration, found = plan.recipe.calibration, []
    widest = max((step.target.in_features for step in plan.steps), default=0)
    samples = max(1, min(calibration.samples // 4, math.ceil(_ENOUGH * widest / calibration.length)))
    saved = duration.by_text * (1 - samples / calibration.samples)
    if saved > 0.1 * duration.seconds:
        found.append(f"fewer tokens (--samples {samples}: about {readable_time(duration.seconds - saved)})")
    if torch.accelerator.is_available():
        found.append("the device of this machine (--device auto)")
    else:
        found.append("a GPU (--device cuda on a machine that has one)")
    quick = "recipes without training or search, and propagate original, take less (lrc recipe list)"
    found.append(f"another recipe: {quick}")
    return found
