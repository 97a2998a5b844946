"""What every step of a run works with: one value, made once and handed down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..calibrate.data import Calibration
from ..checkpoint.artifact import Artifact
from ..model.events import Event, Notify, silent
from ..model.view import ModelView
from ..plan.plan import Planned

STATISTICS = ".lrc-statistics"  # beside the artifact until it is finished
SEARCHED = ".lrc-search"  # trials of a search for a size, beside the artifact until it is finished
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Run:
    """One run.

    Args:
        view: the model; its weights come and go.
        calibration: tokens (samples, length), and those that are held out.
        artifact: the output folder, open; what is finished in it is not done again.
        devices: where layers run; several share the batches of each layer, and the first one solves targets.
        shared: a folder that keeps statistics for other recipes; None keeps them beside the artifact until it is finished.
        notify: is told what was done.
    """

    view: ModelView
    calibration: Calibration
    artifact: Artifact
    devices: Sequence[torch.device] = (CPU,)
    shared: Path | None = None
    notify: Notify = silent

    @property
    def own_folder(self) -> Path:
        """Statistics that are this run's alone, until the artifact is finished."""
        return self.artifact.folder / STATISTICS

    @property
    def statistics_folder(self) -> Path:
        """Where statistics go that other recipes can use."""
        return self.shared or self.own_folder


@dataclass(frozen=True, kw_only=True)
class PlanMade(Event):
    """A draft, or the plan once something was measured that it depends on."""

    plan: Planned


@dataclass(frozen=True, kw_only=True)
class TextRead(Event):
    """The calibration text was read and tokenised."""

    calibration: Calibration
